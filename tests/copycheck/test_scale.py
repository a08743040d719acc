"""The scale: what it is measured from, that fresh images lie at its lower end and copies at its upper one."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from concepts import CONCEPTS
from helpers.checks import drained
from PIL import Image, ImageFilter, ImageOps
from scipy import stats

from sdlora.cache.tensors import Cache
from sdlora.common.bundled import ImageFolder
from sdlora.copycheck import scale as module
from sdlora.copycheck.embedders import Embedders
from sdlora.copycheck.scale import (
    MAX_COMPARED,
    MAX_DECODED,
    NEW_SHARE,
    OWN_SHARE,
    Gallery,
    Scale,
    evenly_spaced,
    make_gallery,
    measures,
    reduced,
    set_scale,
)
from sdlora.copycheck.similarity import registered_correlation
from sdlora.data.dataset import load_dataset
from sdlora.models.load import load_base
from sdlora.pocket.world import random_scene, render
from sdlora.training.data import evaluation_data

ALL = Embedders()


def test_measures_are_the_sum_of_both_scores_and_detail_alone() -> None:
    found = measures(torch.tensor([[0.5, 0.75], [1.0, 1.0], [0.2, 0.5]]), ALL.score_names)
    z = torch.atanh(torch.tensor([0.5, 0.97, 0.2], dtype=torch.float64))
    torch.testing.assert_close(found[:, 1], (z - 0.5) / 0.12)
    both = z + torch.tensor([float(z[0]), float(z[1]), 0.0], dtype=torch.float64)
    torch.testing.assert_close(found[:, 0], (both - 0.9) / 0.3)
    further = measures(torch.tensor([[0.5, 0.75, 0.3, 0.99]]), ("hp_ms", "phash", "sscd", "features"))
    torch.testing.assert_close(further[:, :2], found[:1])
    expected = [(math.atanh(0.3) - 0.31) / 0.15, (math.atanh(0.935) - 0.7) / 0.12]
    torch.testing.assert_close(further[0, 2:], torch.tensor(expected, dtype=torch.float64))


def scale_of(among: list[list[float]], copy: tuple[float, float] = (10.0, 12.0)) -> Scale:
    return Scale(
        torch.tensor(among, dtype=torch.float64).view(-1, 2), torch.tensor(copy, dtype=torch.float64), torch.empty(0)
    )


def z(scale: Scale, *found: float, share: float = 0.0) -> float:
    pair = torch.tensor([[list(found)]], dtype=torch.float64)
    return float(scale.z_scores(pair, torch.tensor([share])))


def test_few_images_are_shrunk_towards_those_of_other_subjects() -> None:
    # Nothing of its own: mean 0, standard deviation 1, and the higher z counts.
    assert z(scale_of([]), 2.0, 0.0) == pytest.approx(2.0)
    assert z(scale_of([]), 0.0, 2.0) == pytest.approx(2.0)
    own = torch.randn(4000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.7 + 2.0
    assert z(scale_of(own.tolist()), 3.4, 0.0) == pytest.approx(2.0, abs=0.05)
    mean = 1.0
    spread = ((8 * 1 + 8 * (2.0 - mean) ** 2) / 16) ** 0.5
    assert z(scale_of([[2.0, 0.0]] * 8), mean + spread, 0.0) == pytest.approx(1.0)


def test_significance_begins_at_a_share_of_the_way_to_a_copy() -> None:
    """Where fresh images spread less than that."""
    empty = scale_of([])
    for share in (NEW_SHARE, OWN_SHARE):
        assert z(empty, share * 10.0, 0.0, share=share) == pytest.approx(stats.norm.isf(0.01), rel=1e-3)
        three = empty._replace(among=torch.empty(0, 3), copy=torch.full((3,), 10.0))
        assert z(three, share * 10.0, 0.0, 0.0, share=share) == pytest.approx(stats.norm.isf(0.02 / 3), rel=1e-3)
    # A base model that draws copies badly does not lower it below the spread of fresh images.
    assert z(scale_of([], copy=(1.0, 0.5)), 2.0, 0.0, share=0.5) == pytest.approx(2.0)


def test_images_known_to_copy_nothing_raise_the_scale() -> None:
    before = scale_of([[0.0, 0.0]] * 8)
    after = before.with_fresh(torch.tensor([[5.0, 5.0]] * 3, dtype=torch.float64))
    assert z(after, 5.0, 5.0) < z(before, 5.0, 5.0) / 2


def data_of(base_folder: Path, folder: Path, images: list[Image.Image], validation: list[Image.Image]) -> Any:
    base = load_base(str(base_folder), device=torch.device("cpu"), dtype=torch.float32)
    datasets = []
    for name, part in (("set", images), ("held", validation)):
        (folder / name).mkdir(exist_ok=True)
        for index, image in enumerate(part):
            image.save(folder / name / f"{index}.png")
            (folder / name / f"{index}.txt").write_text("a scene")
        datasets.append(load_dataset(ImageFolder(str(folder / name))) if part else None)
    data = evaluation_data(datasets[0], Cache(folder / "cache", base), text_is_trained=False)
    list(data.fill("white"))
    return data, make_gallery(datasets[0], datasets[1], "white")


def measured(data: Any, gallery: Gallery) -> Scale:
    def decode(index: int) -> Image.Image:
        return list(gallery.images.values())[index].filter(ImageFilter.GaussianBlur(1))

    return drained(set_scale(data, gallery, ALL, decode))


def test_scale_compares_every_image_with_the_others(tiny_base: Path, tmp_path: Path) -> None:
    images = [render(random_scene(index)) for index in range(3)]
    held = [render(random_scene(10))]
    found = measured(*data_of(tiny_base, tmp_path, images, held))
    assert found.among.shape == (4, 2) and found.copy.shape == (2,)
    for index in range(3):
        others = images[:index] + images[index + 1 :]
        expected = measures(ALL.scores([images[index]], others), ALL.score_names).amax(dim=1)[0]
        torch.testing.assert_close(found.among[index], expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(
        found.among[3], measures(ALL.scores(held, images), ALL.score_names).amax(dim=1)[0], atol=1e-4, rtol=0
    )
    assert float(found.registered[0]) == pytest.approx(
        float(registered_correlation([images[0]], images[1:]).amax()), abs=1e-4
    )


def test_a_crop_beside_its_whole_is_no_fresh_image(tiny_base: Path, tmp_path: Path) -> None:
    """Such a pair made copies look as usual: of 8 significant previews 2 were left."""
    images = [render(random_scene(index)) for index in range(4)]
    crop = images[0].crop((3, 5, 55, 57)).resize((64, 64), Image.Resampling.BICUBIC)
    mirrored = ImageOps.mirror(images[1])
    plain = measured(*data_of(tiny_base, tmp_path, images, []))
    (tmp_path / "more").mkdir()
    found = measured(*data_of(tiny_base, tmp_path / "more", [*images, crop, mirrored], []))
    assert found.among.shape == (6, 2)
    assert float(found.among[:, 1].max()) < (math.atanh(module.SAME_PICTURE) - 0.5) / 0.12
    assert float((found.among.mean(dim=0) - plain.among.mean(dim=0)).abs().max()) < 1


def test_scale_is_read_from_the_cache(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, gallery = data_of(tiny_base, tmp_path, [render(random_scene(index)) for index in range(3)], [])
    first = measured(data, gallery)
    monkeypatch.setattr(module, "registered_correlation", None)
    for one, other in zip(first, measured(data, gallery), strict=True):
        assert torch.equal(one, other)
    next((tmp_path / "cache" / "scale").glob("*/*")).write_bytes(b"damaged")
    with pytest.raises(TypeError):  # computed again
        measured(data, gallery)


def test_time_grows_with_the_number_of_images(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = []
    scores = Embedders.scores

    def counted(self: Embedders, images: Any, known: Any) -> torch.Tensor:
        pairs.append(len(images) * len(known))
        return scores(self, images, known)

    monkeypatch.setattr(Embedders, "scores", counted)
    images = [render(random_scene(index)).resize((32, 32)) for index in range(60)]
    measured(*data_of(tiny_base, tmp_path, images, []))
    assert sum(pairs) == MAX_COMPARED * 60 + MAX_DECODED


def test_fresh_images_of_the_subject_are_not_significant() -> None:
    """Crisp ones, also from the captions of training images, against few images and a base model that draws crisply."""

    def compared(images: list[Image.Image], gallery: list[Image.Image]) -> torch.Tensor:
        return measures(ALL.scores(images, gallery), ALL.score_names)

    alarms = []
    for concept in CONCEPTS.values():
        images = [concept.draw(index, 0)[0] for index in range(8)]
        among = compared(images, images)
        among[torch.eye(8, dtype=torch.bool)] = -99
        scale = Scale(among.amax(dim=1), measures(torch.ones(2), ALL.score_names), torch.empty(0))
        own = [concept.draw(index, 1)[0] for index in range(8)]
        new = [concept.draw(index, 0)[0] for index in range(32, 48)]
        share = torch.tensor([OWN_SHARE] * 8 + [NEW_SHARE] * 16)
        highest = scale.z_scores(compared([*own, *new], images), share).amax(dim=1)
        alarms += (highest >= stats.norm.isf(0.01)).tolist()
        copies = scale.z_scores(compared(images, images), torch.full((8,), OWN_SHARE)).amax(dim=1)
        assert bool((copies > stats.norm.isf(0.01)).all())
    assert sum(alarms) / len(alarms) <= 0.05


def test_evenly_spaced_covers_the_range() -> None:
    assert evenly_spaced(24, 4) == [0, 6, 12, 18]
    assert evenly_spaced(3, 4) == [0, 1, 2]
    assert evenly_spaced(5, 4) == [0, 1, 2, 3]
    assert evenly_spaced(0, 4) == []


def test_only_large_images_are_reduced() -> None:
    large, small = Image.new("L", (1000, 500)), render(random_scene(0))
    assert reduced(large).size == (384, 192)
    assert reduced(large).mode == "RGB"
    assert reduced(small).tobytes() == small.tobytes()
