"""Reading images as people see them, upright, opaque and in 8-bit RGB, and masks, which say what of them is trained.

Pillow leaves orientation, transparency and 16-bit pixels to the caller; all are handled here or refused by name.
A mask is white where its image is trained; it has the size of the image and is cropped with it.
Shapes: H/W pixels, h/w latents.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import struct
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageColor, ImageOps, UnidentifiedImageError, features
from torch import Tensor

from sdlora.errors import DataError

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "AVIF")
PLUGINS = {
    ".heic": ("heic", "pillow_heif", "HEIF"),
    ".heif": ("heic", "pillow_heif", "HEIF"),
    ".jxl": ("jxl", "pillow_jxl", "JXL"),
}
"""Suffixes of formats that Pillow reads with a plugin: sdlora's extra with it, its module, and the format's name."""
MAX_PIXELS = 100_000_000
MAX_SIDE_PX = 65_535
"""JPEG's own limit; what is longer is a damaged header."""
# Pillow's decoders raise all of these on broken files.
_BROKEN = (
    OSError, SyntaxError, ValueError, ArithmeticError, LookupError, TypeError, RuntimeError, MemoryError, struct.error,
    Image.DecompressionBombError,
)  # fmt: skip
_PNG = b"\x89PNG\r\n\x1a\n"
# Transparency, orientation, and the frames of an animation.
_PNG_SIDE_DATA = (b"tRNS", b"eXIf", b"acTL", b"fcTL", b"fdAT")
_SIXTEEN_BITS = ("I;16", "I;16B", "I;16L", "I;16N", "I")
MaskKind = Literal["none", "alpha", "file"]
MASK_SUFFIX = "-mask.png"
T = TypeVar("T")


def load_image(path: Path, background: str, suffix: str | None = None) -> Image.Image:
    """Decode an image to RGB.

    Args:
        path: PNG, JPEG, WebP, BMP, TIFF or AVIF, HEIC or JPEG XL with its plugin, at most 100 million pixels.
        background: Colour that transparent pixels are blended onto, in the syntax of Pillow's ImageColor.
        suffix: The file's own one where the path has another, such as ".heic".

    Returns:
        An RGB image with its EXIF orientation applied.

    Raises:
        DataError: The file is broken, animated, too large, or in another format; the message names it.
    """
    return _decode(path, lambda image: _to_rgb(image, background), suffix)


def image_size(path: Path) -> tuple[int, int]:
    """The width and height of an image's pixels as they are stored; of most files only the header is read.

    Raises:
        DataError: As `load_image`.
    """
    try:
        with Image.open(path, formats=[*FORMATS, *_plugged_in(path.name, path.suffix.lower())]) as opened:
            return opened.size
    except _BROKEN:
        return load_image(path, "white").size  # which mends some files


def load_mask(path: Path, image: Path) -> Image.Image | None:
    """The mask of an image as 8-bit greyscale, upright, in the size of its file.

    Args:
        path: The mask file, or the image itself, whose alpha channel is then the mask: None if it is opaque everywhere.
        image: The image.

    Raises:
        DataError: As `load_image`.
    """
    # Transparent pixels of a mask file are masked out, whatever their colour.
    return _decode(path, _alpha) if path == image else load_image(path, "black").convert("L")


def _decode(path: Path, convert: Callable[[Image.Image], T], suffix: str | None = None) -> T:
    formats = [*FORMATS, *_plugged_in(path.name, (suffix or path.suffix).lower())]
    try:
        return _converted(path, path, formats, convert)
    except DataError:
        if (pixels := _png_without_side_data(path)) is None:
            raise
        return _converted(path, io.BytesIO(pixels), formats, convert)


def _png_without_side_data(path: Path) -> bytes | None:
    """A PNG without the chunks that are not its pixels, such as texts and profiles; None if there are none or it is
    another file."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    if not content.startswith(_PNG):
        return None
    kept, place = [_PNG], len(_PNG)
    while place + 12 <= len(content):
        end = place + 12 + int.from_bytes(content[place : place + 4], "big")
        chunk, kind = content[place:end], content[place + 4 : place + 8]
        is_whole = zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:], "big")
        if kind[:1].isupper() or (kind in _PNG_SIDE_DATA and is_whole):
            kept.append(chunk)
        place = end
    found = b"".join(kept)
    return None if len(found) == len(content) else found


def _converted(path: Path, source: Path | io.BytesIO, formats: list[str], convert: Callable[[Image.Image], T]) -> T:
    try:
        with Image.open(source, formats=formats) as opened:
            # A camera's MPO is a JPEG with a preview behind the image, which Pillow takes for a second frame.
            if opened.format != "MPO" and getattr(opened, "n_frames", 1) > 1:
                raise DataError(f"{path.name}: has several frames or pages. Save the one you want as a PNG.")
            if opened.width * opened.height > MAX_PIXELS or max(opened.size) > MAX_SIDE_PX:
                raise DataError(
                    f"{path.name}: {opened.width} x {opened.height} pixels; the maximum is 100 million, and "
                    f"{MAX_SIDE_PX:,} a side. Scale it down."
                )
            if opened.mode == "F":
                raise DataError(
                    f"{path.name}: floating-point pixels are not supported. Save it with 8 or 16 bits per channel."
                )
            opened.load()
            with suppress(*_BROKEN):  # EXIF that is no EXIF gives no orientation
                ImageOps.exif_transpose(opened, in_place=True)  # a copy would double the memory
            return convert(opened)
    except UnidentifiedImageError as error:
        raise DataError(
            f"{path.name}: not an image in a supported format ({', '.join(formats)}). Save it in one of them."
        ) from error
    except _BROKEN as error:
        if isinstance(error, OSError) and error.errno is not None:  # the system's; Pillow's have no number
            raise DataError(
                f"{path.name}: cannot be read ({error.strerror}). Check the file and its rights."
            ) from error
        raise DataError(f"{path.name}: broken or truncated ({error}). Save it again or remove it.") from error


def _plugged_in(name: str, suffix: str) -> list[str]:
    """The format of a file that only a plugin reads, after loading the plugin; none for other files.

    Raises:
        DataError: The plugin is not installed, or Pillow was built without AVIF.
    """
    if suffix == ".avif" and not features.check("avif"):
        raise DataError(f"{name}: this Pillow was built without AVIF. Save the image as PNG.")
    if suffix not in PLUGINS:
        return []
    extra, module, format_name = PLUGINS[suffix]
    try:
        plugin = importlib.import_module(module)
    except ImportError as error:
        raise DataError(
            f'{name}: not readable without {module}. Install it (pip install "sdlora[{extra}]"), or save the '
            "image as PNG."
        ) from error
    if module == "pillow_heif":
        plugin.register_heif_opener()
    return [format_name]


def _to_rgb(image: Image.Image, background: str) -> Image.Image:
    if image.mode in _SIXTEEN_BITS:
        # Pillow would clip at 255 instead of scaling. Rounded to the nearest, a row at a time to save memory.
        rows = (np.clip((row.astype(np.int64) + 128) // 257, 0, 255).astype(np.uint8) for row in np.asarray(image))
        return Image.fromarray(np.stack(list(rows))).convert("RGB")
    if _has_alpha(image):
        front = image.convert("RGBA")
        paper = Image.new("RGBA", front.size, (*ImageColor.getrgb(background)[:3], 255))
        return Image.alpha_composite(paper, front).convert("RGB")
    return image.convert("RGB")


def _has_alpha(image: Image.Image) -> bool:
    return image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info


def _alpha(image: Image.Image) -> Image.Image | None:
    if image.mode in _SIXTEEN_BITS or not _has_alpha(image):
        return None
    alpha = image.convert("RGBA").getchannel("A")
    return None if alpha.getextrema()[0] == 255 else alpha


def crop_to_bucket(image: Image.Image, width_px: int, height_px: int) -> Image.Image:
    """Scale an image until it covers a bucket, and crop the centre."""
    return ImageOps.fit(image, (width_px, height_px), method=Image.Resampling.LANCZOS, centering=(0.5, 0.5))


def crop_origin(size: tuple[int, int], bucket: tuple[int, int]) -> tuple[int, int]:
    """Left and top of the crop of `crop_to_bucket`, in pixels of the scaled image, from two widths and heights."""
    scale = max(bucket[0] / size[0], bucket[1] / size[1])
    left, top = ((length * scale - kept) / 2 for length, kept in zip(size, bucket, strict=True))
    return round(left), round(top)


def to_tensor(image: Image.Image) -> Tensor:
    """An RGB image to (3, H, W) float32 in [-1, 1]."""
    pixels = torch.from_numpy(np.array(image, dtype=np.uint8))
    return pixels.permute(2, 0, 1).float() / 127.5 - 1


def pixel_hash(image: Image.Image) -> str:
    """The SHA-256 of an image's size and pixels, in hexadecimal."""
    digest = hashlib.sha256(f"{image.mode} {image.width}x{image.height} ".encode())
    digest.update(image.tobytes())
    return digest.hexdigest()


def separate_masks(files: Sequence[Path], kind: MaskKind) -> tuple[list[Path], dict[Path, Path], list[Path]]:
    """Separate masks, named NAME-mask.png beside an image named NAME, from images.

    Args:
        files: The image files of a folder.
        kind: Where masks are looked for. Unless it is "file", a NAME-mask.png without a NAME counts as an image.

    Returns:
        The images; the masks by the path of their image without its suffix; and, if masks are files, masks without an
        image.
    """
    stems = {path.with_suffix("") for path in files}
    masked = (path for path in files if path.name.lower().endswith(MASK_SUFFIX) and len(path.name) > len(MASK_SUFFIX))
    named = {path: path.with_name(path.name[: -len(MASK_SUFFIX)]) for path in masked}
    masks = {stem: path for path, stem in named.items() if stem in stems}
    lone = [path for path, stem in named.items() if kind == "file" and stem not in stems]
    others = {*masks.values(), *lone}
    return [path for path in files if path not in others], masks, lone


def mask_shares(mask: Image.Image, height: int, width: int) -> Tensor:
    """The share of each latent's pixels that a greyscale mask, cropped like its image, lets through.

    Returns:
        (1, h, w) float32 in [0, 1], h by w being the latents' size: means over the pixels of each latent.
    """
    pixels = torch.from_numpy(np.array(mask, dtype=np.float32)) / 255
    return F.adaptive_avg_pool2d(pixels.unsqueeze(0), (height, width))
