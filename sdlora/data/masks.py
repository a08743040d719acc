"""Masks: which parts of an image are trained. White counts, black does not.

A mask has its image's size and is cropped with it. Shapes: H/W pixels, h/w latents.
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
END = "-mask.png"


def sort_masks(files: Sequence[Path], kind: MaskKind) -> tuple[list[Path], dict[str, Path], list[Path]]:
    """Tell images from masks, which are called NAME-mask.png beside an image called NAME.

    Args:
        files: The image files of a folder.
        kind: Where masks are looked for. Unless it is "file", a NAME-mask.png without a NAME is an image.

    Returns:
        The images; masks by their image's stem; and, where masks are files, those that belong to no image.
    """
    stems = {path.stem for path in files}
    masks = {_owner(path): path for path in files if _named_as_mask(path) and _owner(path) in stems}
    lone = [path for path in files if kind == "file" and _named_as_mask(path) and _owner(path) not in stems]
    others = {*masks.values(), *lone}
    return [path for path in files if path not in others], masks, lone


def _named_as_mask(path: Path) -> bool:
    return path.name.lower().endswith(END)


def _owner(path: Path) -> str:
    return path.name[: -len(END)]


def load_mask(path: Path, image: Path) -> Image.Image | None:
    """An image's mask in eight bits of grey, upright, of the file's own size.

    Args:
        path: The mask; the image itself where its alpha channel is the mask.
        image: The image.

    Returns:
        The mask; None if the alpha channel hides nothing.

    Raises:
        DataError: The file cannot be read.
    """
    # What is transparent in a mask file is hidden, too, whatever colour lies there.
    return load_alpha(path) if path == image else load_image(path, "black").convert("L")


def mask_shares(mask: Image.Image, height: int, width: int) -> Tensor:
    """How much of each latent's pixels a mask shows.

    Args:
        mask: Grey, cropped as its image.
        height: Of the latents.
        width: Of the latents.

    Returns:
        (1, h, w) float32 in [0, 1]: means over the pixels of each latent.
    """
    pixels = torch.from_numpy(np.array(mask, dtype=np.float32)) / 255
    return F.adaptive_avg_pool2d(pixels.unsqueeze(0), (height, width))
