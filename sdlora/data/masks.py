"""Masks: which parts of an image are trained (white) and which are not (black).

A mask has the size of its image and is cropped with it. Shapes: H/W pixels, h/w latents.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from sdlora.data.images import load_alpha, load_image

MaskKind = Literal["none", "alpha", "file"]
MASK_SUFFIX = "-mask.png"


def separate_masks(files: Sequence[Path], kind: MaskKind) -> tuple[list[Path], dict[str, Path], list[Path]]:
    """Separate masks, named NAME-mask.png beside an image named NAME, from images.

    Args:
        files: The image files of a folder.
        kind: Where masks are looked for. Unless it is "file", a NAME-mask.png without a NAME counts as an image.

    Returns:
        The images; the masks by the stem of their image; and, if masks are files, masks without an image.
    """
    stems = {path.stem for path in files}
    masks = {_image_stem(path): path for path in files if _has_mask_name(path) and _image_stem(path) in stems}
    lone = [path for path in files if kind == "file" and _has_mask_name(path) and _image_stem(path) not in stems]
    others = {*masks.values(), *lone}
    return [path for path in files if path not in others], masks, lone


def _has_mask_name(path: Path) -> bool:
    return path.name.lower().endswith(MASK_SUFFIX)


def _image_stem(path: Path) -> str:
    return path.name[: -len(MASK_SUFFIX)]


def load_mask(path: Path, image: Path) -> Image.Image | None:
    """The mask of an image as 8-bit greyscale, upright, in the size of its file.

    Args:
        path: The mask file; the image itself if its alpha channel is the mask.
        image: The image.

    Returns:
        The mask; None if the alpha channel is opaque everywhere.

    Raises:
        DataError: The file cannot be read.
    """
    # Transparent pixels of a mask file are masked out, whatever their colour.
    return load_alpha(path) if path == image else load_image(path, "black").convert("L")


def mask_shares(mask: Image.Image, height: int, width: int) -> Tensor:
    """The share of each latent's pixels that a mask lets through.

    Args:
        mask: Greyscale, cropped like its image.
        height: Height of the latents.
        width: Width of the latents.

    Returns:
        (1, h, w) float32 in [0, 1]: means over the pixels of each latent.
    """
    pixels = torch.from_numpy(np.array(mask, dtype=np.float32)) / 255
    return F.adaptive_avg_pool2d(pixels.unsqueeze(0), (height, width))
