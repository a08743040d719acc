from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from sdlora.data.checks import Checkup, examine
from sdlora.data.dataset import Example, Source, load_dataset, load_mask_pixels, load_pixels
from sdlora.data.masks import MaskKind, mask_shares, separate_masks
from sdlora.errors import DataError


def put(folder: Path, name: str, size: tuple[int, int] = (48, 32), caption: bool = True) -> None:
    # Each image has details of its own, or they would be taken for one image saved twice.
    noise = np.random.default_rng(sum(map(ord, name))).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / name)
    if caption:
        (folder / name).with_suffix(".txt").write_text("a thing")


def put_mask(folder: Path, name: str, size: tuple[int, int] = (48, 32), box: tuple[int, ...] = (0, 0, 23, 31)) -> None:
    mask = Image.new("L", size)
    ImageDraw.Draw(mask).rectangle(box, fill=255)
    mask.save(folder / name)


def check(folder: Path, masks: MaskKind) -> Checkup:
    return examine(folder, background="white", masks=masks)


def test_masks_are_matched_to_images_by_name() -> None:
    files = [Path(name) for name in ("a.jpg", "a-mask.png", "b.png", "carnival-mask.png", "c-MASK.PNG", "c.png")]
    images, masks, lone = separate_masks(files, "file")
    assert [path.name for path in images] == ["a.jpg", "b.png", "c.png"]
    assert {stem: path.name for stem, path in masks.items()} == {"a": "a-mask.png", "c": "c-MASK.PNG"}
    assert [path.name for path in lone] == ["carnival-mask.png"]
    # An image that is only called so is one, as long as nobody asks for mask files.
    images, _, lone = separate_masks(files, "alpha")
    assert ("carnival-mask.png" in [path.name for path in images], lone) == (True, [])


def test_shares_are_means_over_each_latents_pixels() -> None:
    mask = Image.new("L", (16, 8))
    ImageDraw.Draw(mask).rectangle((0, 0, 11, 3), fill=255)
    expected = np.asarray(mask, dtype=np.float64).reshape(2, 4, 4, 4).mean(axis=(1, 3)) / 255
    torch.testing.assert_close(mask_shares(mask, 2, 4), torch.tensor(expected[None], dtype=torch.float32))
    assert mask_shares(mask, 1, 2).tolist() == [[[0.5, 0.25]]]


def test_mask_is_cropped_like_its_image(tmp_path: Path) -> None:
    put(tmp_path, "a.png", (64, 32))
    # What is white in the image is white in the mask, so both crops must show the same.
    put_mask(tmp_path, "a-mask.png", (64, 32), (20, 8, 44, 31))
    Image.open(tmp_path / "a-mask.png").convert("RGB").save(tmp_path / "a.png")
    data = load_dataset(Source(tmp_path), masks="file")
    for buckets in (True, False):
        (example,) = data.with_buckets(32, 8, buckets=buckets).examples
        mask = load_mask_pixels(example)
        assert mask is not None
        assert np.array_equal(np.asarray(mask), np.asarray(load_pixels(example, "white"))[:, :, 0])


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_alpha_channel_is_a_mask_unless_opaque(tmp_path: Path, mode: str) -> None:
    for name, hidden in {"a.png": True, "b.png": False}.items():
        image = Image.new("RGBA", (8, 8), (255, 0, 0, 255))
        if hidden:
            ImageDraw.Draw(image).rectangle((0, 0, 3, 7), fill=(0, 0, 0, 0))
        image.convert(mode).save(tmp_path / name, format="TIFF" if mode == "PA" else None)
    for name, expected in {"a.png": [0.0, 1.0], "b.png": None}.items():
        path = tmp_path / name
        mask = load_mask_pixels(Example(name, path, "x", (8, 8), (8, 8), path))
        assert (mask if mask is None else mask_shares(mask, 1, 2).flatten().tolist()) == expected


def test_alpha_channel_is_rotated_with_its_image(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees
    image = Image.new("RGBA", (8, 4), (255, 0, 0, 255))
    ImageDraw.Draw(image).rectangle((0, 0, 3, 3), fill=(0, 0, 0, 0))
    image.save(tmp_path / "a.png", exif=exif)
    mask = load_mask_pixels(Example("a.png", tmp_path / "a.png", "x", (4, 8), (4, 8), tmp_path / "a.png"))
    assert mask is not None
    assert mask.size == (4, 8)
    assert mask_shares(mask, 2, 1).flatten().tolist() == [0.0, 1.0]


def test_check_separates_masks_from_images(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        put(tmp_path, name)
    put_mask(tmp_path, "a-mask.png")
    put_mask(tmp_path, "c-mask.png")
    checkup = check(tmp_path, "file")
    assert checkup.num_files == 2
    assert [image.mask and image.mask.name for image in checkup.images] == ["a-mask.png", None]
    assert [(f.kind, f.severity, f.files) for f in checkup.findings] == [
        ("lone mask", "warning", ("c-mask.png",)), ("no mask", "warning", ("b.png",)),
    ]  # fmt: skip
    # Not asked for, a mask is told, and a file that only sounds like one is an image (without a caption).
    (tmp_path / "c-mask.txt").write_text("a carnival")
    checkup = check(tmp_path, "none")
    assert checkup.num_files == 3
    assert [(f.kind, f.files) for f in checkup.findings] == [("unused mask", ("a-mask.png",))]


def test_unusable_masks_are_errors(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "c.png"):
        put(tmp_path, name)
    put_mask(tmp_path, "a-mask.png", (32, 48))
    put_mask(tmp_path, "c-mask.png", box=(-2, -2, -1, -1))
    (tmp_path / "b-mask.png").write_bytes(b"no image")
    found = {f.files[0]: f.message for f in check(tmp_path, "file").findings if f.severity == "error"}
    assert found.keys() == {"a-mask.png", "b-mask.png", "c-mask.png"}
    assert "32 x 48" in found["a-mask.png"] and "48 x 32" in found["a-mask.png"]
    assert "b-mask.png" in found["b-mask.png"]
    assert "c.png" in found["c-mask.png"]


def test_mask_that_is_cropped_away_entirely_is_refused(tmp_path: Path) -> None:
    put(tmp_path, "a.png", (96, 32))
    put_mask(tmp_path, "a-mask.png", (96, 32), (0, 0, 7, 31))
    example = Example("a.png", tmp_path / "a.png", "x", (32, 32), (32, 32), tmp_path / "a-mask.png")
    with pytest.raises(DataError, match=r"32 x 32 .*a\.png"):
        load_mask_pixels(example)


def test_folder_with_only_masks_is_refused(tmp_path: Path) -> None:
    put_mask(tmp_path, "a-mask.png")
    with pytest.raises(DataError, match="only masks"):
        check(tmp_path, "file")
