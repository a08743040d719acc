"""Similarity scores for copies of an image, of a part of it, its mirror image or a warped one, without any network.

Called for a set's scale and the previews. `hp_ms` compares detail (the image minus its own blur), so that two
images of one subject in one scene stay apart, and finds crops; `phash` compares the coarse layout and finds warped
copies; `registered_correlation` registers images by a smooth displacement first, after which a warped copy matches in
its detail. Two images of one subject match a little, too, so scores are compared with those of other images of the
subject. None of them finds a subject moved into another scene.
Shapes: P images, G images of the gallery, N pairs, K waves of the displacement, H/W/n pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

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
MAX_ASPECT = 4.0
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

    All become luma of their own shape with a short edge of 64 px, or, slightly blurred, of 96 px if no image of the
    gallery is smaller than that. First one and then the other is shrunk to each scale, has its 9x9 box mean subtracted,
    and is matched at every position of the other; the score is the highest zero-mean normalised cross-correlation.

    Returns:
        (P, G) float32 in [-1, 1]; 1 is a copy, and an image without detail scores 0.

    Raises:
        ValueError: One of the two is empty.

    Source: zero-mean normalised cross-correlation, Lewis 1995, "Fast normalized cross-correlation", equation 2.
    """
    require_images(images, gallery)
    size_px = FINE_PX if min(min(image.size) for image in gallery) >= FINE_PX else SIZE_PX
    best = torch.empty(len(images), len(gallery))
    known_of_shape = _lumas(gallery, size_px)
    for rows, seen in _lumas(images, size_px):
        for columns, known in known_of_shape:
            best[np.ix_(rows, columns)] = _over_scales(seen, known)
    return best


def _lumas(images: Sequence[Image.Image], short_px: int) -> list[tuple[list[int], Tensor]]:
    """Luma with a given short edge: for every shape the indices of its images, and (N, 1, H, W)."""
    shapes = [_shape(image, short_px) for image in images]
    found = []
    for shape in dict.fromkeys(shapes):
        indices = [index for index, other in enumerate(shapes) if other == shape]
        values = luma([images[index] for index in indices], shape)
        if short_px == FINE_PX:
            # A crop falls between two pixels and between two scales, where the finest detail does not match.
            values = blur(values[:, 0], FINE_BLUR_PX).unsqueeze(1)
        found.append((indices, values))
    return found


def _shape(image: Image.Image, short_px: int) -> tuple[int, int]:
    """Width and height of an image whose short edge is resized; the long one is at most `MAX_ASPECT` times as long."""
    ratio = short_px / min(image.size)
    width, height = (min(round(edge * ratio), round(short_px * MAX_ASPECT)) for edge in image.size)
    return width, height


def _over_scales(seen: Tensor, known: Tensor) -> Tensor:
    """`hp_ms` of lumas of one shape with lumas of another, (P, 1, H, W) and (G, 1, H', W') to (P, G)."""
    both = torch.cat([seen, seen.flip(-1)])
    best = torch.full((len(both), len(known)), -1.0)
    for scale in SCALES:
        best = torch.maximum(best, _best_matches(both, known, scale))
        if scale < 1 or seen.shape[2:] != known.shape[2:]:
            best = torch.maximum(best, _best_matches(known, both, scale).T)
    return torch.maximum(best[: len(seen)], best[len(seen) :])


def phash(images: Sequence[Image.Image], gallery: Sequence[Image.Image]) -> Tensor:
    """The share of equal bits in the perceptual hashes of every image, or its mirror image, and every one of a gallery.

    An image of the gallery that has another shape is compared by its best part of the image's shape (`_parts`).

    Returns:
        (P, G) float32 in [0, 1], in steps of 1/64; 1 is a copy, unrelated images have about a half.

    Raises:
        ValueError: One of the two is empty.

    Source: Zauner 2010, "Implementation and benchmarking of perceptual image hash functions", section 3.2.1, as
    implemented by the library imagehash.
    """
    require_images(images, gallery)
    scores = torch.full((len(images), len(gallery)), -1.0)
    for rows, parts, owners in _parts(images, gallery):
        seen, known = [images[row] for row in rows], _hashes(parts)
        mirrored = _hashes([ImageOps.mirror(image) for image in seen])
        equal = torch.maximum(_hashes(seen) @ known.T, mirrored @ known.T) / known.shape[1]
        for column in range(len(gallery)):
            scores[rows, column] = equal[:, owners == column].amax(dim=1)
    return (scores + 1) / 2


def _parts(
    images: Sequence[Image.Image], gallery: Sequence[Image.Image]
) -> Iterator[tuple[list[int], list[Image.Image], Tensor]]:
    """The largest parts of a gallery's images that have the shapes of others, at nine places along the longer side.

    Yields:
        For every shape: the indices of its images, the parts, which are whole images where the shape is the same, and
        the index of each part's image, (N,).
    """
    aspects = [round(image.width / image.height, 2) for image in images]
    for aspect in dict.fromkeys(aspects):
        parts, owners = [], []
        for owner, image in enumerate(gallery):
            width, height = image.width, image.height
            if round(width / height, 2) != aspect:
                width, height = min(width, round(height * aspect)), min(height, round(width / aspect))
            across, down = image.width - width, image.height - height
            corners = {(across * i // 8, down * i // 8) for i in range(9)}
            parts += [image.crop((x, y, x + width, y + height)) for x, y in sorted(corners)]
            owners += [owner] * len(corners)
        yield [row for row, other in enumerate(aspects) if other == aspect], parts, torch.tensor(owners)


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


def luma(images: Sequence[Image.Image], size: tuple[int, int] = (SIZE_PX, SIZE_PX)) -> Tensor:
    """Brightness in [0, 1] by Rec. 601 at a width and height, (P, 1, H, W)."""
    small = [image.convert("L").resize(size, Image.Resampling.BOX) for image in images]
    return torch.stack([torch.from_numpy(np.array(image, dtype=np.float32) / 255) for image in small]).unsqueeze(1)


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
    num_inside = _box_sums(F.pad(torch.ones_like(values[:1]), margin), BOX_PX, BOX_PX)
    return values - _box_sums(F.pad(values, margin), BOX_PX, BOX_PX) / num_inside


def unit_vectors(values: Tensor) -> Tensor:
    """Centred unit vectors, whose products are correlations, same shape (N, D); what is nearly flat stays shorter."""
    return F.normalize(values - values.mean(dim=1, keepdim=True), dim=1, eps=_FLAT)


def _box_sums(values: Tensor, height: int, width: int) -> Tensor:
    """Sums over all boxes of a size, (..., H, W) to (..., H - height + 1, W - width + 1).

    Differences of cumulative sums, in float64: as exact as pooling and much faster.
    """
    summed = F.pad(values.double(), (1, 0, 1, 0)).cumsum(-1).cumsum(-2)
    rows = summed[..., height:, :] - summed[..., :-height, :]
    return (rows[..., width:] - rows[..., :-width]).to(values.dtype)


def _best_matches(templates: Tensor, images: Tensor, scale: float) -> Tensor:
    """The best match of each template, shrunk, over all positions in each image, (templates, images).

    It is -1 if the template does not fit into the image.
    """
    height, width = (round(scale * edge) for edge in templates.shape[-2:])
    rows, columns = images.shape[-2] - height + 1, images.shape[-1] - width + 1
    if rows < 1 or columns < 1:
        return torch.full((len(templates), len(images)), -1.0)
    shrunk = F.interpolate(templates, size=(height, width), mode="bilinear", antialias=True, align_corners=False)
    flat = unit_vectors(detail(shrunk).flatten(1))
    fine = detail(images)
    mean, mean_square = (_box_sums(values[:, 0], height, width) / (height * width) for values in (fine, fine.square()))
    deviation = (mean_square - mean.square()).clamp(min=0).sqrt() * (height * width) ** 0.5
    deviation = deviation.clamp(min=_FLAT)
    # At the valid positions the template lies inside the image, so the Fourier transform's wrap-around does no harm.
    # Only those are transformed back: first the rows, then of each column.
    shape = images.shape[-2:]
    spectrum = torch.fft.rfft2(fine[:, 0]).mT.contiguous()
    scores = []
    for chunk in torch.split(flat.view(-1, height, width), _CHUNK):
        template = torch.fft.rfft2(chunk, s=shape).conj().mT.contiguous()
        halfway = torch.fft.ifft(template.unsqueeze(1) * spectrum)[..., :rows].mT.contiguous()
        correlation = torch.fft.irfft(halfway, n=shape[1])[..., :columns]
        scores.append((correlation / deviation).amax(dim=(2, 3)))
    return torch.cat(scores)


def registered_correlation(
    images: Sequence[Image.Image], gallery: Sequence[Image.Image], excluded: Tensor | None = None
) -> Tensor:
    """The correlation of detail between every image and its likeliest matches in a gallery, after registration.

    All become 64x64 luma; an image of the gallery that has another shape is represented by parts of the image's shape
    (`_parts`). The two whose layout correlates best, mirrored or not, are registered to the image (`register`); the
    score is the zero-mean normalised cross-correlation, where they overlap, of both blurred by 2 px and minus their 9x9
    box mean.

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
    scores = torch.full((len(images), len(gallery)), -1.0)
    for rows, parts, owners in _parts(images, gallery):
        seen, known = luma([images[row] for row in rows])[:, 0], luma(parts)[:, 0]
        both = torch.stack([seen, seen.flip(-1)], dim=1)  # (P, 2, H, W)
        similarity = _layout(both) @ _layout(known).T  # (P, 2, parts)
        if excluded is not None:
            similarity = similarity.masked_fill(excluded[rows][:, owners].unsqueeze(1), -torch.inf)
        best, mirrored = similarity.max(dim=1)
        count = min(NUM_CANDIDATES, len(known))
        column = best.topk(count, dim=1).indices.flatten()
        row = torch.arange(len(seen)).repeat_interleave(count)
        row, column = (index[best[row, column] > -torch.inf] for index in (row, column))
        for chunk in torch.split(torch.arange(len(row)), _PAIRS_CHUNK):
            r, c = row[chunk], column[chunk]
            found = _correlation(both[r, mirrored[r, c]], known[c])
            for i, j, value in zip(r.tolist(), owners[c].tolist(), found, strict=True):
                scores[rows[i], j] = torch.maximum(scores[rows[i], j], value)
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
