from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sdlora.data.images import crop_origin, crop_to_bucket, load_image, pixel_hash, to_tensor
from sdlora.errors import DataError

CORNERS = [[(255, 0, 0), (0, 255, 0), (0, 0, 255)], [(255, 255, 0), (0, 255, 255), (255, 0, 255)]]


def pixels(image: Image.Image) -> list[list[tuple[int, ...]]]:
    return [[tuple(int(v) for v in p) for p in row] for row in np.asarray(image)]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int) -> None:
    upright = np.array(CORNERS, dtype=np.uint8)
    # What a camera stores, so that the stated orientation shows it upright (EXIF 2.3, table of the orientation tag).
    stored = {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1],
        5: upright.transpose(1, 0, 2), 6: np.rot90(upright, 1), 7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "turned.png"
    Image.fromarray(np.ascontiguousarray(stored)).save(path, exif=exif)
    assert pixels(load_image(path, "white")) == [[tuple(p) for p in row] for row in CORNERS]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_show_the_background(tmp_path: Path, mode: str) -> None:
    image = Image.new("RGBA", (2, 1), (200, 200, 200, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    path = tmp_path / "clear.png"
    image.convert(mode).save(path)
    found = pixels(load_image(path, "#0a141e"))[0]
    assert found[0] == (200, 200, 200)
    assert found[1] == (10, 20, 30)


def test_half_transparent_pixels_are_blended(tmp_path: Path) -> None:
    Image.new("RGBA", (1, 1), (255, 0, 0, 128)).save(tmp_path / "half.png")
    assert pixels(load_image(tmp_path / "half.png", "white")) == [[(255, 127, 127)]]


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path: Path) -> None:
    values = np.array([[0, 257, 40000, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    assert pixels(load_image(tmp_path / "deep.png", "white"))[0] == [(0,) * 3, (1,) * 3, (156,) * 3, (255,) * 3]


def test_cmyk_grey_and_bilevel_images_become_rgb(tmp_path: Path) -> None:
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "print.jpg", quality=100)
    red = pixels(load_image(tmp_path / "print.jpg", "white"))[4][4]
    assert red[0] > 245 and red[1] < 10 and red[2] < 10
    Image.new("L", (1, 1), 77).save(tmp_path / "grey.png")
    assert pixels(load_image(tmp_path / "grey.png", "white")) == [[(77, 77, 77)]]
    Image.new("1", (1, 1), 1).save(tmp_path / "bit.png")
    assert pixels(load_image(tmp_path / "bit.png", "black")) == [[(255, 255, 255)]]


def test_animated_and_unreadable_files_are_refused_by_name(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "film.webp", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "film.png", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "still.gif")
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:3000])
    (tmp_path / "page.jpg").write_text("<html>")
    (tmp_path / "empty.png").write_bytes(b"")
    Image.new("F", (4, 4)).save(tmp_path / "deep.tif")
    for name, reason in {
        "film.webp": "frames", "film.png": "frames", "still.gif": "supported format", "cut.png": "truncated",
        "page.jpg": "supported format", "empty.png": "supported format", "deep.tif": "floating-point",
    }.items():  # fmt: skip
        with pytest.raises(DataError, match=rf"^{name}.*{reason}"):
            load_image(tmp_path / name, "white")


def test_crop_keeps_the_centre_and_the_aspect_ratio() -> None:
    wide = Image.new("RGB", (90, 30), "red")
    wide.paste((0, 0, 255), (30, 0, 60, 30))
    square = crop_to_bucket(wide, 30, 30)
    assert square.size == (30, 30)
    assert pixels(square)[15][15] == (0, 0, 255)
    assert crop_to_bucket(wide, 64, 32).size == (64, 32)


def test_tensor_range_and_hash() -> None:
    image = Image.new("RGB", (2, 3), (0, 255, 51))
    tensor = to_tensor(image)
    assert tensor.shape == (3, 3, 2)
    torch.testing.assert_close(tensor[:, 0, 0], torch.tensor([-1.0, 1.0, -0.6]))
    other = image.copy()
    other.putpixel((0, 0), (0, 255, 52))
    assert pixel_hash(image) == pixel_hash(image.copy()) != pixel_hash(other)
    assert pixel_hash(Image.new("RGB", (2, 3))) != pixel_hash(Image.new("RGB", (3, 2)))


@pytest.mark.parametrize(("size", "bucket"), [((60, 30), (30, 30)), ((200, 400), (32, 48)), ((50, 70), (80, 64))])
def test_crop_origin_is_where_the_crop_begins(size: tuple[int, int], bucket: tuple[int, int]) -> None:
    ramp = np.add.outer(np.linspace(0, 120, size[1]), np.linspace(0, 130, size[0])).astype(np.uint8)
    image = Image.fromarray(ramp).convert("RGB")
    scale = max(bucket[0] / size[0], bucket[1] / size[1])
    scaled = image.resize((round(size[0] * scale), round(size[1] * scale)), Image.Resampling.LANCZOS)
    left, top = crop_origin(size, bucket)
    expected = np.asarray(scaled.crop((left, top, left + bucket[0], top + bucket[1]))).astype(int)
    found = np.asarray(crop_to_bucket(image, *bucket)).astype(int)
    # Half a pixel of the ramp is at most 4 grey levels here; a wrong side or axis is dozens.
    assert abs(found - expected).max() <= 4
