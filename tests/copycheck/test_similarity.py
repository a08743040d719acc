"""Scores are near 1 for every kind of copy, and separate copies from fresh renders of the same subject."""

from __future__ import annotations

from collections.abc import Callable

import imagehash
import numpy as np
import pytest
import torch
from concepts import CONCEPTS
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torch import Tensor
from torch.nn import functional as F

from sdlora.copycheck import similarity
from sdlora.copycheck.similarity import hp_ms, phash, registered_correlation


def _crop(share: float) -> Callable[[Image.Image], Image.Image]:
    def cropped(image: Image.Image) -> Image.Image:
        edge = round(image.width * share)
        left, top = (image.width - edge) // 3, (image.height - edge) * 2 // 3
        return image.crop((left, top, left + edge, top + edge)).resize(image.size, Image.Resampling.BICUBIC)

    return cropped


def _jitter(image: Image.Image) -> Image.Image:
    toned = ImageEnhance.Brightness(ImageEnhance.Contrast(image).enhance(0.8)).enhance(1.15)
    noise = np.random.default_rng(0).normal(0, 6, (image.height, image.width, 3))
    noisy = np.asarray(toned.filter(ImageFilter.GaussianBlur(0.5)), dtype=float) + noise
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


COPIES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "exact": lambda image: image,
    "flip": ImageOps.mirror,
    "crop 80": _crop(0.8),
    "crop 60": _crop(0.6),
    "jitter": _jitter,
    "all at once": lambda image: _jitter(_crop(0.7)(ImageOps.mirror(image))),
}


@pytest.fixture(scope="module")
def gallery() -> list[Image.Image]:
    return [CONCEPTS["kolo"].draw(index, 0)[0] for index in range(12)]


@pytest.fixture(scope="module")
def independent(gallery: list[Image.Image]) -> Tensor:
    """Best scores of fresh renders of the same captions, the hardest images that are not copies."""
    return hp_ms([CONCEPTS["kolo"].draw(index, 1)[0] for index in range(12)], gallery).amax(dim=1)


@pytest.mark.parametrize("name", COPIES)
def test_copies_score_above_fresh_renders(name: str, gallery: list[Image.Image], independent: Tensor) -> None:
    scores = hp_ms([COPIES[name](image) for image in gallery], gallery)
    own = scores.diagonal()
    area_under_curve = float((own.unsqueeze(1) > independent).float().mean())
    assert area_under_curve >= 0.99, (own, independent)
    assert scores.argmax(dim=1).tolist() == list(range(len(gallery)))


def test_image_containing_another_is_found(gallery: list[Image.Image]) -> None:
    parts = [_crop(0.7)(image) for image in gallery[:4]]
    assert hp_ms(gallery[:4], parts).diagonal().min() > 0.85


SHAPES = {"4:5": (160, 200), "2:3": (144, 216), "16:9": (240, 135)}


def _cut(image: Image.Image, size: tuple[int, int], place: float) -> Image.Image:
    """A part of a given size, at a share of what is left over on either edge."""
    left, top = (int((whole - part) * place) for whole, part in zip(image.size, size, strict=True))
    return image.crop((left, top, left + size[0], top + size[1]))


@pytest.mark.parametrize(("shape", "mirrored"), [("4:5", False), ("2:3", True), ("16:9", False)])
def test_square_part_of_an_image_of_another_shape_is_found(
    shape: str, mirrored: bool, gallery: list[Image.Image]
) -> None:
    """Without its shape, a copy of all that fits into a square scored like an unrelated image."""
    large = [image.resize((240, 240), Image.Resampling.BICUBIC) for image in gallery[:6]]
    images = [_cut(image, SHAPES[shape], 0.5) for image in large]
    short = min(SHAPES[shape])
    copies = [_cut(image, (short, short), 0.3) for image in images]
    if mirrored:
        copies = [ImageOps.mirror(image) for image in copies]
    fresh = [CONCEPTS["kolo"].draw(index, 1)[0].resize((240, 240), Image.Resampling.BICUBIC) for index in range(6)]
    independent = [_cut(_cut(image, SHAPES[shape], 0.5), (short, short), 0.3) for image in fresh]
    for score, least, area in ((hp_ms, 0.9, 1.0), (phash, 0.75, 0.8), (registered_correlation, 0.9, 0.95)):
        own = score(copies, images).diagonal()
        assert own.min() > least, score
        others = score(independent, images).amax(dim=1)
        assert float((own.unsqueeze(1) > others).float().mean()) >= area, score


def test_image_of_another_shape_that_contains_the_whole_is_found(gallery: list[Image.Image]) -> None:
    wide = [Image.new("RGB", (230, 128), "grey") for _ in gallery]
    for paper, image in zip(wide, gallery, strict=True):
        paper.paste(image.resize((128, 128), Image.Resampling.BICUBIC), (70, 0))
    assert hp_ms(wide, gallery).argmax(dim=1).tolist() == list(range(len(gallery)))
    assert hp_ms(wide, gallery).diagonal().min() > 0.85


@pytest.mark.parametrize("edge", [64, 96])
def test_hp_ms_equals_the_formula(edge: int) -> None:
    """At full size it is one correlation coefficient, here computed by numpy in float64."""
    draw = np.random.default_rng(1)
    images = [Image.fromarray(draw.integers(0, 256, (edge, edge), dtype=np.uint8)) for _ in range(2)]

    def detail(image: Image.Image) -> np.ndarray:
        luma = np.asarray(image, dtype=np.float64) / 255
        if edge == 96:
            weights = np.exp(-(np.arange(-2, 3) ** 2) / (2 * 0.7**2))
            padded = np.pad(luma, 2, mode="edge")
            windows = np.lib.stride_tricks.sliding_window_view(padded, (5, 5))
            luma = (windows * np.outer(weights, weights)).sum(axis=(2, 3)) / weights.sum() ** 2
        rows = range(edge)
        return np.array(
            [[luma[y, x] - luma[max(0, y - 4) : y + 5, max(0, x - 4) : x + 5].mean() for x in rows] for y in rows]
        )

    mixed = Image.blend(*images, 0.3)
    expected = np.corrcoef(detail(mixed).ravel(), detail(images[0]).ravel())[0, 1]
    assert float(hp_ms([mixed], [images[0]])) == pytest.approx(expected, abs=1e-5)


def test_best_match_of_a_shrunk_template_is_the_highest_correlation_of_all_places() -> None:
    draw = torch.Generator().manual_seed(0)
    template, image = (torch.rand(1, 1, 32, 32, generator=draw) for _ in range(2))
    image[..., 18:] += 2.0  # an edge: the detail of a place beside it is not zero on average
    image[..., 22:, :] += 1.0
    edge = 8
    shrunk = F.interpolate(template, size=(edge, edge), mode="bilinear", antialias=True, align_corners=False)
    flat, fine = similarity.detail(shrunk).flatten().numpy(), similarity.detail(image)[0, 0].numpy()
    places = np.lib.stride_tricks.sliding_window_view(fine, (edge, edge)).reshape(-1, edge * edge)
    expected = max(np.corrcoef(place, flat)[0, 1] for place in places)
    assert float(similarity._best_matches(template, image, 0.25)) == pytest.approx(expected, abs=1e-5)


def test_small_gallery_image_lowers_the_resolution_for_all() -> None:
    draw = np.random.default_rng(2)
    images = [Image.fromarray(draw.integers(0, 256, (192, 192), dtype=np.uint8)) for _ in range(2)]
    small = [image.resize((64, 64), Image.Resampling.BOX) for image in images]
    coarse, fine = hp_ms(small, small), hp_ms(images, images)
    assert torch.equal(hp_ms(images, [*images, small[0].resize((300, 95))])[:, :2], coarse)
    assert (fine - coarse)[0, 1].abs() > 1e-3
    assert fine.diagonal().tolist() == pytest.approx([1.0, 1.0], abs=1e-5)


def test_phash_is_the_share_of_equal_bits_mirrored_or_not(gallery: list[Image.Image]) -> None:
    others = [gallery[0].convert("L"), gallery[1].resize((96, 96)), gallery[2].resize((300, 300)), _jitter(gallery[3])]
    found = phash([*gallery, *others], gallery)
    for row, image in enumerate([*gallery, *others]):
        both = [imagehash.phash(image), imagehash.phash(ImageOps.mirror(image))]
        expected = [1 - min(own - imagehash.phash(known) for own in both) / 64 for known in gallery]
        assert found[row].tolist() == expected


@pytest.mark.parametrize("name", ["exact", "flip", "jitter"])
def test_copies_of_the_whole_image_have_nearly_the_same_hash(name: str, gallery: list[Image.Image]) -> None:
    scores = phash([COPIES[name](image) for image in gallery], gallery)
    assert scores.diagonal().min() >= (1.0 if name == "exact" else 0.8)
    assert scores.argmax(dim=1).tolist() == list(range(len(gallery)))


def test_flat_images_score_zero_and_empty_input_raises() -> None:
    grey = Image.new("RGB", (64, 64), (90, 90, 90))
    assert float(hp_ms([grey], [grey])) == pytest.approx(0.0, abs=1e-3)
    assert torch.isfinite(hp_ms([grey], [CONCEPTS["zumi"].draw(0, 0)[0]])).all()
    with pytest.raises(ValueError, match="both need at least one"):
        hp_ms([], [grey])
    with pytest.raises(ValueError, match="both need at least one"):
        phash([grey], [])
