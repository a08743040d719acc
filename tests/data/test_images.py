import errno
import sys
import zlib
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image, ImageDraw

from sdlora.common.bundled import BucketOptions, ImageFolder
from sdlora.data.checks import Checkup, decode, examine, image_files
from sdlora.data.dataset import Example, load_dataset, load_mask_pixels, load_pixels
from sdlora.data.images import (
    MaskKind,
    crop_origin,
    crop_to_bucket,
    load_image,
    mask_shares,
    pixel_hash,
    separate_masks,
    to_tensor,
)
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


def test_a_cameras_preview_and_broken_exif_do_not_matter(tmp_path: Path) -> None:
    image, preview = Image.new("RGB", (16, 8), "red"), Image.new("RGB", (8, 4), "blue")
    image.save(tmp_path / "camera.jpg", format="MPO", save_all=True, append_images=[preview])
    image.save(tmp_path / "odd.jpg", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\x00garbage")
    for name in ("camera.jpg", "odd.jpg"):
        found = load_image(tmp_path / name, "white")
        assert found.size == (16, 8) and pixels(found)[4][8][0] > 240, name


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


def test_formats_that_plugins_read_are_read_or_name_the_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = Image.new("RGB", (64, 32), (200, 40, 40))
    image.save(tmp_path / "a.avif")
    assert load_image(tmp_path / "a.avif", "white").size == (64, 32)
    monkeypatch.setattr("sdlora.data.images.features.check", lambda _: False)
    with pytest.raises(DataError, match=r"a\.avif: this Pillow was built without AVIF"):
        load_image(tmp_path / "a.avif", "white")
    for name, module, extra in [("B.HEIC", "pillow_heif", "heic"), ("c.jxl", "pillow_jxl", "jxl")]:
        with monkeypatch.context() as missing:
            missing.setitem(sys.modules, module, None)
            with pytest.raises(DataError, match=rf'^{name}: .*pip install "sdlora\[{extra}\]"'):
                load_image(tmp_path / name, "white")


@pytest.mark.parametrize(
    ("name", "module"), [("a.heic", "pillow_heif"), ("a.HEIF", "pillow_heif"), ("a.jxl", "pillow_jxl")]
)
def test_plugins_read_their_formats(tmp_path: Path, name: str, module: str) -> None:
    plugin = pytest.importorskip(module)
    if module == "pillow_heif":
        plugin.register_heif_opener()
    Image.new("RGB", (64, 32), (200, 40, 40)).save(tmp_path / name, format="JXL" if module == "pillow_jxl" else "HEIF")
    found = np.asarray(load_image(tmp_path / name, "white")).astype(int)
    assert found.shape == (32, 64, 3)
    assert abs(found - (200, 40, 40)).max() < 8
    (tmp_path / name).write_bytes(b"broken")
    with pytest.raises(DataError, match=f"^{name}"):
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
    assert {image.name: path.name for image, path in masks.items()} == {"a": "a-mask.png", "c": "c-MASK.PNG"}
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
    data = load_dataset(ImageFolder(str(tmp_path)), masks="file")
    for buckets in (True, False):
        (example,) = data.with_buckets(32, BucketOptions(8, buckets=buckets)).examples
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


def chunk(kind: bytes, data: bytes, crc: int | None = None) -> bytes:
    own = zlib.crc32(kind + data) if crc is None else crc
    return len(data).to_bytes(4, "big") + kind + data + own.to_bytes(4, "big")


SIDE_DATA = {
    "long text": chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"x" * (3 << 20))),
    "long profile": chunk(b"iCCP", b"name\0\0" + zlib.compress(b"x" * (3 << 20))),
    "wrong checksum": chunk(b"tEXt", b"Comment\0hello", crc=7),
}


@pytest.mark.parametrize("kind", SIDE_DATA)
def test_pixels_of_a_png_are_read_whatever_lies_beside_them(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "a.png"
    Image.fromarray(np.array(CORNERS, dtype=np.uint8)).save(file)
    content = file.read_bytes()
    header = 8 + 25
    file.write_bytes(content[:header] + SIDE_DATA[kind] + content[header:])
    assert pixels(load_image(file, "white")) == pixels(Image.fromarray(np.array(CORNERS, dtype=np.uint8)))
    file.write_bytes(content[:header] + SIDE_DATA[kind] + content[header:-30])
    with pytest.raises(DataError, match=r"a\.png: broken"):
        load_image(file, "white")


def test_file_that_the_system_does_not_open_is_not_called_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "open", refuse)
    with pytest.raises(DataError, match=r"a\.png: cannot be read \(Permission denied\)"):
        load_image(tmp_path / "a.png", "white")
    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(DataError, match=r"folder .* cannot be read \(Permission denied\)"):
        image_files(tmp_path)


def test_a_large_image_is_freed_when_it_is_decoded(tmp_path: Path) -> None:
    Image.linear_gradient("L").resize((5000, 4000)).convert("RGB").save(tmp_path / "large.jpg")
    Image.new("RGB", (64, 64)).save(tmp_path / "small.png")
    process = psutil.Process()
    decode(tmp_path / "small.png", "white")
    before = process.memory_info().rss
    decode(tmp_path / "large.jpg", "white")
    assert process.memory_info().rss - before < 10e6, "its pixels take 60 MB"
