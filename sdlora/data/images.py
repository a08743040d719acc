"""Reading images as people see them: upright, opaque, eight bits of RGB.

Pillow leaves orientation, transparency and 16 bits to the caller; here each is treated or refused by name.
Shapes: H/W pixels.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image, ImageColor, ImageOps, UnidentifiedImageError
from torch import Tensor

from sdlora.errors import DataError

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif"})
MAX_PIXELS = 100_000_000
# Pillow's decoders raise whatever a broken file makes them stumble over.
_BROKEN = (
    OSError, SyntaxError, ValueError, ArithmeticError, LookupError, TypeError, MemoryError, struct.error,
    Image.DecompressionBombError,
)  # fmt: skip
_SIXTEEN_BITS = ("I;16", "I;16B", "I;16L", "I;16N", "I")
T = TypeVar("T")


def load_image(path: Path, background: str) -> Image.Image:
    """Decode an image to RGB.

    Args:
        path: PNG, JPEG, WebP, BMP or TIFF, at most 100 million pixels.
        background: The colour laid under transparent pixels, as Pillow's ImageColor understands it.

    Returns:
        An RGB image, its EXIF orientation applied.

    Raises:
        DataError: The file is broken, animated, too large, or of another format; the message names it.
    """
    return _decode(path, lambda image: _to_rgb(image, background))


def load_alpha(path: Path) -> Image.Image | None:
    """How opaque an image is, in eight bits of grey, upright; None if it is opaque everywhere.

    Raises:
        DataError: As `load_image`.
    """
    return _decode(path, _alpha)


def _decode(path: Path, convert: Callable[[Image.Image], T]) -> T:
    try:
        with Image.open(path, formats=FORMATS) as opened:
            if getattr(opened, "n_frames", 1) > 1:
                raise DataError(f"{path.name}: animated or of several pages. Save the frame you want as a PNG.")
            if opened.width * opened.height > MAX_PIXELS:
                raise DataError(
                    f"{path.name}: {opened.width} x {opened.height} pixels are more than 100 million. Make it smaller."
                )
            if opened.mode == "F":
                raise DataError(f"{path.name}: floating-point pixels are not read. Save it with 8 or 16 bits.")
            opened.load()
            ImageOps.exif_transpose(opened, in_place=True)  # a copy of a large image would take as much again
            return convert(opened)
    except UnidentifiedImageError as error:
        allowed = ", ".join(FORMATS)
        raise DataError(
            f"{path.name}: not an image of a format that is read ({allowed}). Save it as one of them."
        ) from error
    except _BROKEN as error:
        raise DataError(f"{path.name}: broken or cut off ({error}). Save it anew or take it out.") from error


def _to_rgb(image: Image.Image, background: str) -> Image.Image:
    if image.mode in _SIXTEEN_BITS:
        # Pillow would clip at 255 instead of scaling.
        values = np.asarray(image).astype(np.float64)
        grey = Image.fromarray(np.clip(np.rint(values / 257), 0, 255).astype(np.uint8))
        return grey.convert("RGB")
    if _has_alpha(image):
        color = ImageColor.getrgb(background)[:3]
        front = image.convert("RGBA")
        paper = Image.new("RGBA", front.size, (*color, 255))
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
    """Scale an image until it covers a bucket, then cut the middle out."""
    return ImageOps.fit(image, (width_px, height_px), method=Image.Resampling.LANCZOS, centering=(0.5, 0.5))


def crop_origin(size: tuple[int, int], bucket: tuple[int, int]) -> tuple[int, int]:
    """Where `crop_to_bucket` begins to cut, from left and top in pixels of the scaled image.

    Args:
        size: The image's width and height.
        bucket: Width and height that are cut out.
    """
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
