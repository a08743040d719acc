"""Images from anywhere: broken ones are refused by name in bounded memory, odd ones are read as people see them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers.broken_images import beside_pixels, corrupt, decode_all, encoded, noise
from helpers.commandline import CommandLine
from helpers.promises import Figure
from PIL import Image, ImageCms

from sdlora.common.bundled import ImageFolder
from sdlora.data.dataset import load_dataset
from sdlora.data.images import load_image
from sdlora.errors import DataError


def test_broken_images_are_refused_by_name_in_bounded_memory(
    command: CommandLine, tmp_path: Path, figure: Figure
) -> None:
    files = corrupt()
    assert len(files) >= 40
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    (folder / "a.ok.png").write_bytes(encoded("PNG"))
    bombs = beside_pixels()
    for name, content in bombs.items():
        (folder / name).write_bytes(content)
    outcome = command.call(decode_all, folder, tmp_path / "report")
    assert outcome.code == 0, outcome.err
    *lines, rise = (tmp_path / "report").read_text(encoding="utf-8").splitlines()
    found = dict(line.split("\t") for line in lines)
    assert found.pop("a.ok.png") == "(64, 48)"
    assert {found.pop(name) for name in bombs} == {"(4, 4)"}, "texts do not matter, pixels are read"
    read = {name: said for name, said in found.items() if not said.startswith(f"refused: {name}: ")}
    assert not read, "every message begins with the file's name"
    assert int(rise) <= 300
    for name in files:
        (folder / name).with_suffix(".txt").write_text("a thing")
    with pytest.raises(DataError) as caught:
        load_dataset(ImageFolder(str(folder), caption="x"))
    assert all(f"  {name}: " in str(caught.value) for name in files), "all are named at once"
    figure("Broken images", f"{len(files)} of {len(files)} refused by name; memory rose by {rise} MB")


Expected = Callable[[], np.ndarray] | str


def rgb(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB"))


def turned(orientation: int) -> bytes:
    # Rows and columns as a camera stores them (EXIF 2.3, the orientation tag), undone by viewers.
    stored = {
        1: lambda p: p, 2: np.fliplr, 3: lambda p: np.rot90(p, 2), 4: np.flipud,
        5: lambda p: p.transpose(1, 0, 2), 6: lambda p: np.rot90(p, 1),
        7: lambda p: np.rot90(p, 2).transpose(1, 0, 2), 8: lambda p: np.rot90(p, -1),
    }[orientation](np.asarray(noise()))  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded("PNG", Image.fromarray(np.ascontiguousarray(stored)), exif=exif)


def palette_with_alpha() -> Image.Image:
    image = noise().quantize(8)
    image.info["transparency"] = 3
    return image


def tricky() -> dict[str, tuple[bytes, Expected]]:
    """Files by name, with the pixels that a person sees, or the reason why the file is refused."""
    seen = lambda: np.asarray(noise())  # noqa: E731
    grey = noise(channels=3).convert("L")
    deep = np.arange(64 * 48, dtype=np.uint16).reshape(48, 64) * 21
    half = noise(channels=4)

    def over_white() -> np.ndarray:
        front, cover = np.asarray(half)[..., :3].astype(float), np.asarray(half)[..., 3:] / 255.0
        return np.rint(front * cover + 255 * (1 - cover))

    pale = Image.merge("LA", (grey, Image.new("L", grey.size, 0)))
    flat = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    quantized = palette_with_alpha()
    holes = np.asarray(quantized) == 3
    with_holes = np.where(holes[..., None], 255, rgb(noise().quantize(8)))
    bits = grey.convert("1")
    return {
        **{f"orientation{i}.png": (turned(i), seen) for i in range(1, 9)},
        "cmyk.jpg": (encoded("JPEG", flat, quality=100), lambda: np.full((16, 16, 3), (255, 0, 0))),
        "16-bit.png": (encoded("PNG", Image.fromarray(deep)), lambda: np.rint(deep[..., None].repeat(3, 2) / 257.0)),
        "16-bit.tif": (encoded("TIFF", Image.fromarray(deep)), lambda: np.rint(deep[..., None].repeat(3, 2) / 257.0)),
        "palette-alpha.png": (encoded("PNG", quantized), lambda: with_holes),
        "grey-alpha.png": (encoded("PNG", pale), lambda: np.full((48, 64, 3), 255)),
        "half-clear.png": (encoded("PNG", half), over_white),
        "half-clear.webp": (encoded("WEBP", half, lossless=True, exact=True), over_white),
        "one-bit.png": (encoded("PNG", bits), lambda: rgb(bits)),
        "grey.jpg": (encoded("JPEG", grey, quality=100), lambda: rgb(grey)),
        "progressive.jpg": (encoded("JPEG", grey, quality=100, progressive=True), lambda: rgb(grey)),
        "lossless.webp": (encoded("WEBP", lossless=True), seen),
        "packed.tif": (encoded("TIFF", compression="tiff_lzw"), seen),
        "palette.bmp": (encoded("BMP", noise().quantize(8)), lambda: rgb(noise().quantize(8))),
        "profile.png": (encoded("PNG", icc_profile=profile), seen),
        "a-line.png": (encoded("PNG", noise((20_000, 1))), lambda: np.asarray(noise((20_000, 1)))),
        "trailing.png": (encoded("PNG") + b"<script>alert(1)</script>", seen),
        "gif.gif": (encoded("GIF"), "supported format"),
        "floats.tif": (encoded("TIFF", Image.new("F", (4, 4))), "floating-point"),
    }  # fmt: skip


def test_odd_images_are_read_as_people_see_them_or_refused_in_words(tmp_path: Path, figure: Figure) -> None:
    files = tricky()
    assert len(files) >= 20
    for name, (content, expected) in files.items():
        (tmp_path / name).write_bytes(content)
        if isinstance(expected, str):
            with pytest.raises(DataError, match=rf"^{name}: .*{expected}"):
                load_image(tmp_path / name, "white")
            continue
        found = np.asarray(load_image(tmp_path / name, "white")).astype(float)
        # JPEG rounds, and so does laying one image over another.
        allowed = 3 if name.endswith(".jpg") else 1 if "half" in name else 0
        assert found.shape == expected().shape, name
        assert np.abs(found - expected()).max() <= allowed, name
    figure("Unusual images", f"{len(files)} of {len(files)}: pixels as seen, or refused in words")
