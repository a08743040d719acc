"""How much an image looks like a copy of another: of all of it, of a part of it, or of its mirror image.

It needs no network. `hp_ms` compares detail (the image minus its own blur), so that two images of one
subject in one place stay apart, and finds parts; `phash` compares the coarse layout, and finds what was pulled out of
shape. A subject lifted into another place is found by neither.
Shapes: P images, G images of the gallery, H/W/n pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import imagehash
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

SIZE_PX = 64
# Images large enough for it are looked at more closely: what two photographs of one thing share is coarse.
FINE_PX = 96
FINE_BLUR_PX = 0.7
BOX_PX = 9
# Eleven scales: with five, a crop between two of them is missed.
SCALES = tuple(1.0 - 0.05 * index for index in range(11))
_CHUNK = 8
_FLAT = 1e-4  # detail weaker than this is none


def hp_ms(images: Sequence[Image.Image], gallery: Sequence[Image.Image]) -> Tensor:
    """The best correlation of detail between every image and every image of a gallery, over crops and mirrors.

    Both become 64x64 luma, or 96x96 and blurred a little, if no image of the gallery is smaller than that. One of the
    two, and then the other, is shrunk to each scale, gets its 9x9 box mean subtracted, and is laid over every place of
    the other; the score is the highest zero-mean normalised cross-correlation found.

    Args:
        images: P images of any mode and size.
        gallery: G images they may be copies of.

    Returns:
        (P, G) float32 in [-1, 1]; 1 is a copy, an image without any detail scores 0.

    Raises:
        ValueError: One of the two is empty.

    Source: zero-mean normalised cross-correlation, Lewis 1995, "Fast normalized cross-correlation", equation 2.
    """
    check_both(images, gallery)
    size_px = FINE_PX if min(min(image.size) for image in gallery) >= FINE_PX else SIZE_PX
    seen, known = luma(images, size_px), luma(gallery, size_px)
    if size_px == FINE_PX:
        # A crop comes to lie between two pixels and between two scales, where the finest detail does not match.
        seen, known = (blur(values[:, 0], FINE_BLUR_PX).unsqueeze(1) for values in (seen, known))
    both = torch.cat([seen, seen.flip(-1)])
    best = torch.full((len(both), len(known)), -1.0)
    for scale in SCALES:
        size = round(scale * size_px)
        best = torch.maximum(best, _laid_over(both, known, size))
        if size < size_px:
            best = torch.maximum(best, _laid_over(known, both, size).T)
    return torch.maximum(best[: len(seen)], best[len(seen) :])


def phash(images: Sequence[Image.Image], gallery: Sequence[Image.Image]) -> Tensor:
    """The share of equal bits in the perceptual hashes of every image and every image of a gallery.

    The better of two is taken, of the image and of its mirror image.

    Args:
        images: P images of any mode and size.
        gallery: G images they may be copies of.

    Returns:
        (P, G) float32 in [0, 1], in steps of 1/64; 1 is a copy, about a half is chance.

    Raises:
        ValueError: One of the two is empty.

    Source: Zauner 2010, "Implementation and benchmarking of perceptual image hash functions", section 3.2.1, in the
    variant of the library imagehash (low waves with the constant one, above their median).
    """
    check_both(images, gallery)
    known = _hashes(gallery)
    mirrored = _hashes([ImageOps.mirror(image) for image in images])
    equal = torch.maximum(_hashes(images) @ known.T, mirrored @ known.T)
    return (equal / known.shape[1] + 1) / 2


def _hashes(images: Sequence[Image.Image]) -> Tensor:
    """The 64 bits of each image's perceptual hash as 1 and -1, (P, 64)."""
    bits = np.stack([imagehash.phash(image).hash.flatten() for image in images])
    return torch.from_numpy(bits).float() * 2 - 1


def check_both(images: Sequence[Image.Image], gallery: Sequence[Image.Image]) -> None:
    """See that there is something to compare.

    Raises:
        ValueError: There is not.
    """
    if not images or not gallery:
        raise ValueError(f"Found {len(images)} images and a gallery of {len(gallery)}; both need at least one.")


def luma(images: Sequence[Image.Image], size_px: int = SIZE_PX) -> Tensor:
    """Brightness in [0, 1] by Rec. 601, (P, 1, size, size)."""
    small = [p.convert("L").resize((size_px, size_px), Image.Resampling.BOX) for p in images]
    return torch.stack([torch.from_numpy(np.array(p, dtype=np.float32) / 255) for p in small]).unsqueeze(1)


def blur(images: Tensor, sigma: float) -> Tensor:
    """By a Gaussian, cut off at three deviations, (N, H, W)."""
    reach = int(3 * sigma)
    kernel = torch.exp(-torch.arange(-reach, reach + 1).square() / (2 * sigma**2))
    kernel = kernel / kernel.sum()
    padded = F.pad(images.unsqueeze(1), (reach,) * 4, mode="replicate")
    rows = F.conv2d(padded, kernel.view(1, 1, 1, -1))
    return F.conv2d(rows, kernel.view(1, 1, -1, 1))[:, 0]


def detail(values: Tensor) -> Tensor:
    """What a 9x9 box blur takes away, same shape; over an edge the box is smaller."""
    margin = (BOX_PX // 2,) * 4
    num_inside = _box_sums(F.pad(torch.ones_like(values[:1]), margin), BOX_PX)
    return values - _box_sums(F.pad(values, margin), BOX_PX) / num_inside


def _box_sums(values: Tensor, size: int) -> Tensor:
    """Sums over all boxes of size x size, (..., H, W) to (..., H - size + 1, W - size + 1).

    Differences of running sums: many times as fast as pooling, and in float64 as exact.
    """
    summed = F.pad(values.double(), (1, 0, 1, 0)).cumsum(-1).cumsum(-2)
    rows = summed[..., size:, :] - summed[..., :-size, :]
    return (rows[..., size:] - rows[..., :-size]).to(values.dtype)


def _laid_over(stamps: Tensor, images: Tensor, size: int) -> Tensor:
    """The best match of each stamp, shrunk to size x size, over all places in each image, (stamps, images)."""
    shrunk = F.interpolate(stamps, size=(size, size), mode="bilinear", antialias=True, align_corners=False)
    flat = detail(shrunk).flatten(1)
    flat = flat - flat.mean(dim=1, keepdim=True)
    flat = flat / flat.norm(dim=1, keepdim=True).clamp(min=_FLAT)
    fine = detail(images)
    mean, mean_square = (_box_sums(values[:, 0], size) / size**2 for values in (fine, fine.square()))
    deviation = ((mean_square - mean.square()).clamp(min=0).sqrt() * size).clamp(min=_FLAT)
    # A stamp never hangs over an edge where it counts, so the Fourier transform's wrapping round does no harm. Only
    # the places that count are transformed back: first the rows, then of each column.
    spectrum = torch.fft.rfft2(fine[:, 0]).mT.contiguous()
    edge = images.shape[-1]
    places = edge - size + 1
    scores = []
    for chunk in flat.view(-1, size, size).split(_CHUNK):
        stamp = torch.fft.rfft2(chunk, s=(edge, edge)).conj().mT.contiguous()
        rows = torch.fft.ifft(stamp.unsqueeze(1) * spectrum)[..., :places].mT.contiguous()
        correlation = torch.fft.irfft(rows, n=edge)[..., :places]
        scores.append((correlation / deviation).amax(dim=(2, 3)))
    return torch.cat(scores)
