"""Similarity scores for copies of an image, of a part of it, its mirror image or a warped one, without any network.

Called for the null distribution and the previews. `hp_ms` compares detail (the image minus its own blur), so that two
images of one subject in one scene stay apart, and finds crops; `phash` compares the coarse layout and finds warped
copies; `registered_correlation` registers images by a smooth displacement first, after which a warped copy matches in
its detail. Two images of one subject match a little, too, so scores are compared with those of other images of the
subject. None of them finds a subject moved into another scene.
Shapes: P images, G images of the gallery, N pairs, K waves of the displacement, H/W/n pixels.
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
_CHUNK, _PAIRS_CHUNK = 8, 64
_FLAT = 1e-4  # weaker detail counts as none

# Registration.
NUM_CANDIDATES = 2
DEGREE = 4
LEVELS_PX = (4.0, 2.0, 1.0)
STEPS = 6
STIFFNESS = 0.005
MOST_PX = SIZE_PX / 8
LAYOUT_PX = 3.0
SMOOTH_PX = 2.0


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


def registered_correlation(
    images: Sequence[Image.Image], gallery: Sequence[Image.Image], excluded: Tensor | None = None
) -> Tensor:
    """The correlation of detail between every image and its likeliest matches in a gallery, after registration.

    Both become 64x64 luma. The two images of the gallery whose layout correlates best, mirrored or not, are registered
    to the image (`register`); the score is the zero-mean normalised cross-correlation, where they overlap, of both
    blurred by 2 px and minus their 9x9 box mean.

    Args:
        images: P images of any mode and size.
        gallery: G images that may have been copied.
        excluded: Pairs to skip, (P, G), or None.

    Returns:
        (P, G) float32 in [-1, 1]; 1 is a copy, and -1 marks pairs that were not registered.

    Raises:
        ValueError: One of the two is empty.
    """
    require_images(images, gallery)
    seen, known = luma(images)[:, 0], luma(gallery)[:, 0]
    both = torch.stack([seen, seen.flip(-1)], dim=1)  # (P, 2, H, W)
    similarity = _layout(both) @ _layout(known).T  # (P, 2, G)
    if excluded is not None:
        similarity = similarity.masked_fill(excluded.unsqueeze(1), -torch.inf)
    best, mirrored = similarity.max(dim=1)
    scores = torch.full(best.shape, -1.0)
    count = min(NUM_CANDIDATES, len(known))
    column = best.topk(count, dim=1).indices.flatten()
    row = torch.arange(len(seen)).repeat_interleave(count)
    row, column = (index[best[row, column] > -torch.inf] for index in (row, column))
    for chunk in torch.split(torch.arange(len(row)), _PAIRS_CHUNK):
        r, c = row[chunk], column[chunk]
        scores[r, c] = _correlation(both[r, mirrored[r, c]], known[c])
    return scores


def register(moving: Tensor, still: Tensor) -> Tensor:
    """The smooth displacement that aligns images to others.

    It minimises |still(x) - moving(x + u(x))|^2 + stiffness * sum of (1 + n)^2 c^2, where u is a sum of products of
    Legendre polynomials (of total degree n, coefficients c in pixels). Both images are normalised to mean 0 and
    standard deviation 1 over their overlap, so that brightness and contrast do not matter. Solved by Gauss-Newton
    steps from coarse to fine.

    Args:
        moving, still: Luma, (N, 64, 64).

    Returns:
        u, (N, 2, 64, 64) in pixels, along x and then y; at most 8 px either way.

    Source: Lucas & Kanade 1981, "An iterative image registration technique"; Baker & Matthews 2004, "Lucas-Kanade 20
    years on", section 2 (forwards, additive).
    """
    waves, orders = _waves()
    flat = waves.flatten(1).T.contiguous()  # (H W, K)
    upper = torch.triu_indices(len(waves), len(waves))
    pairs = flat[:, upper[0]] * flat[:, upper[1]]  # terms of the normal equations, (H W, K (K + 1) / 2)
    position = torch.zeros(len(waves), len(waves), dtype=torch.long)
    position[upper[0], upper[1]] = position[upper[1], upper[0]] = torch.arange(upper.shape[1])
    penalty = STIFFNESS * (1 + orders).square().repeat(2)
    coefficients = torch.zeros(len(moving), 2 * len(waves))
    for sigma in LEVELS_PX:
        blurred, aim = blur(moving, sigma), blur(still, sigma)
        for _ in range(STEPS):
            moved, inside = _move(blurred, _displacement(coefficients, waves))
            moved, target = _standard(moved, inside), _standard(aim, inside)
            x, y = ((slope * inside).flatten(1) for slope in torch.gradient(moved, dim=(2, 1)))
            xx, xy, yy = ((product @ pairs)[:, position] for product in (x * x, x * y, y * y))
            normal = torch.cat([torch.cat([xx, xy], dim=2), torch.cat([xy, yy], dim=2)], dim=1)
            error = (target - moved).flatten(1)
            pull = torch.cat([(x * error) @ flat, (y * error) @ flat], dim=1)
            stiff = normal.diagonal(dim1=1, dim2=2).mean(dim=1, keepdim=True) * penalty + _FLAT
            step = torch.linalg.solve(normal + torch.diag_embed(stiff), pull - stiff * coefficients)
            coefficients = coefficients + step
    return _displacement(coefficients, waves)


def _correlation(moving: Tensor, still: Tensor) -> Tensor:
    """The correlation of detail after registration, (N,)."""
    moved, inside = _move(moving, register(moving, still))
    first, second = (detail(blur(x, SMOOTH_PX).unsqueeze(1))[:, 0] for x in (moved, still))
    num = inside.sum(dim=(1, 2)).clamp(min=1)
    first, second = (
        ((x - ((x * inside).sum(dim=(1, 2)) / num)[:, None, None]) * inside).flatten(1) for x in (first, second)
    )
    lengths = first.norm(dim=1) * second.norm(dim=1)
    correlation: Tensor = (first * second).sum(dim=1) / lengths.clamp(min=_FLAT)
    return correlation


def _waves() -> tuple[Tensor, Tensor]:
    """Products of Legendre polynomials over an image, (K, 64, 64), and their degrees, (K,)."""
    x = torch.linspace(-1, 1, SIZE_PX)
    lines = [torch.ones_like(x), x]
    for n in range(1, DEGREE):  # Bonnet's recursion
        lines.append(((2 * n + 1) * x * lines[n] - n * lines[n - 1]) / (n + 1))
    pairs = [(i, j) for i in range(DEGREE + 1) for j in range(DEGREE + 1)]
    waves = torch.stack([torch.outer(lines[i], lines[j]) for i, j in pairs])
    return waves, torch.tensor([float(i + j) for i, j in pairs])


def _displacement(coefficients: Tensor, waves: Tensor) -> Tensor:
    both = coefficients.view(len(coefficients), 2, len(waves))
    return (both @ waves.flatten(1)).clamp(-MOST_PX, MOST_PX).view(-1, 2, SIZE_PX, SIZE_PX)


def _move(images: Tensor, displacement: Tensor) -> tuple[Tensor, Tensor]:
    """Images sampled at x + u(x), and a mask: 1 where that lies inside them, else 0."""
    line = torch.arange(SIZE_PX, dtype=torch.float32)
    x, y = displacement[:, 0] + line, displacement[:, 1] + line.unsqueeze(1)
    last = SIZE_PX - 1
    grid = torch.stack([x, y], dim=-1) * (2 / last) - 1
    moved = F.grid_sample(images.unsqueeze(1), grid, mode="bilinear", padding_mode="border", align_corners=True)
    return moved[:, 0], ((x >= 0) & (x <= last) & (y >= 0) & (y <= last)).float()


def _standard(images: Tensor, inside: Tensor) -> Tensor:
    """Images normalised to mean 0 and standard deviation 1 inside the mask."""
    num = inside.sum(dim=(1, 2)).clamp(min=1)
    centred = images - ((images * inside).sum(dim=(1, 2)) / num)[:, None, None]
    deviation = ((centred.square() * inside).sum(dim=(1, 2)) / num).sqrt().clamp(min=1e-3)
    standard: Tensor = centred / deviation[:, None, None]
    return standard


def _layout(images: Tensor) -> Tensor:
    """Blurred images as centred unit vectors, whose products are correlations, (..., H W)."""
    vectors = unit_vectors(blur(images.reshape(-1, SIZE_PX, SIZE_PX), LAYOUT_PX).flatten(1))
    return vectors.view(*images.shape[:-2], -1)
