"""Similarity to warped copies: images are registered by a smooth displacement and then correlated.

Called for the null distribution and the previews. After registration a warped copy matches in its detail. Two images
of one subject match a little too, so scores are compared with those of other images of the subject.
Shapes: P images, G images of the gallery, N pairs, K waves of the displacement, H/W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from sdlora.copycheck.similarity import SIZE_PX, blur, detail, luma, require_images, unit_vectors

NUM_CANDIDATES = 2
DEGREE = 4
LEVELS_PX = (4.0, 2.0, 1.0)
STEPS = 6
STIFFNESS = 0.005
MOST_PX = SIZE_PX / 8
LAYOUT_PX = 3.0
SMOOTH_PX = 2.0
_CHUNK = 64
_FLAT = 1e-4  # weaker detail counts as none


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
    for chunk in torch.split(torch.arange(len(row)), _CHUNK):
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
