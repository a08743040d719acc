"""Similarity scores for copies of an image, of a part of it, or of its mirror image, without any network.

Called for the null distribution and the previews. `hp_ms` compares detail (the image minus its own blur), so that two
images of one subject in one scene stay apart, and finds crops; `phash` compares the coarse layout and finds warped
copies. Neither finds a subject moved into another scene.
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
# Larger images are compared at a finer scale: what two photographs of one subject share is coarse.
FINE_PX = 96
FINE_BLUR_PX = 0.7
BOX_PX = 9
# Eleven scales: five miss crops between two of them.
SCALES = tuple(1.0 - 0.05 * index for index in range(11))
_CHUNK = 8
_FLAT = 1e-4  # weaker detail counts as none


def hp_ms(images: Sequence[Image.Image], gallery: Sequence[Image.Image]) -> Tensor:
    """The highest correlation of detail between every image and every image of a gallery, over crops and mirroring.

    Both become 64x64 luma, or slightly blurred 96x96 luma if no image of the gallery is smaller than that. First one
    and then the other is shrunk to each scale, has its 9x9 box mean subtracted, and is matched at every position of the
    other; the score is the highest zero-mean normalised cross-correlation.

    Returns:
        (P, G) float32 in [-1, 1]; 1 is a copy, and an image without detail scores 0.

    Raises:
        ValueError: One of the two is empty.

    Source: zero-mean normalised cross-correlation, Lewis 1995, "Fast normalized cross-correlation", equation 2.
    """
    require_images(images, gallery)
    size_px = FINE_PX if min(min(image.size) for image in gallery) >= FINE_PX else SIZE_PX
    seen, known = luma(images, size_px), luma(gallery, size_px)
    if size_px == FINE_PX:
        # A crop falls between two pixels and between two scales, where the finest detail does not match.
        seen, known = (blur(values[:, 0], FINE_BLUR_PX).unsqueeze(1) for values in (seen, known))
    both = torch.cat([seen, seen.flip(-1)])
    best = torch.full((len(both), len(known)), -1.0)
    for scale in SCALES:
        size = round(scale * size_px)
        best = torch.maximum(best, _best_matches(both, known, size))
        if size < size_px:
            best = torch.maximum(best, _best_matches(known, both, size).T)
    return torch.maximum(best[: len(seen)], best[len(seen) :])


def phash(images: Sequence[Image.Image], gallery: Sequence[Image.Image]) -> Tensor:
    """The share of equal bits in the perceptual hashes of every image, or its mirror image, and every one of a gallery.

    Returns:
        (P, G) float32 in [0, 1], in steps of 1/64; 1 is a copy, unrelated images have about a half.

    Raises:
        ValueError: One of the two is empty.

    Source: Zauner 2010, "Implementation and benchmarking of perceptual image hash functions", section 3.2.1, as
    implemented by the library imagehash.
    """
    require_images(images, gallery)
    known = _hashes(gallery)
    mirrored = _hashes([ImageOps.mirror(image) for image in images])
    equal = torch.maximum(_hashes(images) @ known.T, mirrored @ known.T)
    return (equal / known.shape[1] + 1) / 2


def _hashes(images: Sequence[Image.Image]) -> Tensor:
    """The 64 bits of each image's perceptual hash as 1 and -1, (P, 64)."""
    bits = np.stack([imagehash.phash(image).hash.flatten() for image in images])
    return torch.from_numpy(bits).float() * 2 - 1


def require_images(images: Sequence[Image.Image], gallery: Sequence[Image.Image]) -> None:
    """Check that there is something to compare.

    Raises:
        ValueError: There are no images, or the gallery is empty.
    """
    if not images or not gallery:
        raise ValueError(
            f"Cannot compare {len(images)} images with a gallery of {len(gallery)}; both need at least one."
        )


def luma(images: Sequence[Image.Image], size_px: int = SIZE_PX) -> Tensor:
    """Brightness in [0, 1] by Rec. 601, (P, 1, size, size)."""
    small = [p.convert("L").resize((size_px, size_px), Image.Resampling.BOX) for p in images]
    return torch.stack([torch.from_numpy(np.array(p, dtype=np.float32) / 255) for p in small]).unsqueeze(1)


def blur(images: Tensor, sigma: float) -> Tensor:
    """Gaussian blur, truncated at three standard deviations, (N, H, W)."""
    reach = int(3 * sigma)
    kernel = torch.exp(-torch.arange(-reach, reach + 1).square() / (2 * sigma**2))
    kernel = kernel / kernel.sum()
    padded = F.pad(images.unsqueeze(1), (reach,) * 4, mode="replicate")
    rows = F.conv2d(padded, kernel.view(1, 1, 1, -1))
    return F.conv2d(rows, kernel.view(1, 1, -1, 1))[:, 0]


def detail(values: Tensor) -> Tensor:
    """The image minus its 9x9 box mean, same shape; at an edge the box is smaller."""
    margin = (BOX_PX // 2,) * 4
    num_inside = _box_sums(F.pad(torch.ones_like(values[:1]), margin), BOX_PX)
    return values - _box_sums(F.pad(values, margin), BOX_PX) / num_inside


def unit_vectors(values: Tensor) -> Tensor:
    """Centred unit vectors, whose products are correlations, same shape (N, D); what is nearly flat stays shorter."""
    return F.normalize(values - values.mean(dim=1, keepdim=True), dim=1, eps=_FLAT)


def _box_sums(values: Tensor, size: int) -> Tensor:
    """Sums over all boxes of size x size, (..., H, W) to (..., H - size + 1, W - size + 1).

    Differences of cumulative sums, in float64: as exact as pooling and much faster.
    """
    summed = F.pad(values.double(), (1, 0, 1, 0)).cumsum(-1).cumsum(-2)
    rows = summed[..., size:, :] - summed[..., :-size, :]
    return (rows[..., size:] - rows[..., :-size]).to(values.dtype)


def _best_matches(templates: Tensor, images: Tensor, size: int) -> Tensor:
    """The best match of each template, shrunk to size x size, over all positions in each image, (templates, images)."""
    shrunk = F.interpolate(templates, size=(size, size), mode="bilinear", antialias=True, align_corners=False)
    flat = unit_vectors(detail(shrunk).flatten(1))
    fine = detail(images)
    mean, mean_square = (_box_sums(values[:, 0], size) / size**2 for values in (fine, fine.square()))
    deviation = ((mean_square - mean.square()).clamp(min=0).sqrt() * size).clamp(min=_FLAT)
    # At the valid positions the template lies inside the image, so the Fourier transform's wrap-around does no harm.
    # Only those are transformed back: first the rows, then of each column.
    spectrum = torch.fft.rfft2(fine[:, 0]).mT.contiguous()
    edge = images.shape[-1]
    positions = edge - size + 1
    scores = []
    for chunk in torch.split(flat.view(-1, size, size), _CHUNK):
        template = torch.fft.rfft2(chunk, s=(edge, edge)).conj().mT.contiguous()
        rows = torch.fft.ifft(template.unsqueeze(1) * spectrum)[..., :positions].mT.contiguous()
        correlation = torch.fft.irfft(rows, n=edge)[..., :positions]
        scores.append((correlation / deviation).amax(dim=(2, 3)))
    return torch.cat(scores)
