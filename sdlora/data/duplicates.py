"""Near-duplicates: the same image saved again, resized, compressed, slightly recoloured or mirrored.

Pure; `checks` reports them. Shapes: P images, n = 16 * 16 * 3 values of a thumbnail.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SIZE_PX = 16
BOX_PX = 5
_BLOCK = 256
MIN_CORRELATION = 0.96
"""The lowest correlation of near-duplicates (`python tests/benchmarks/duplicates.py`).

Among 4,000 scenes of the pocket world that it was not tuned on, none of the 7,998,000 pairs reaches it; the highest is
0.941. All copies of 1,000 of them pass: at half, three quarters and four times the size, as JPEG of quality 80 (the
lowest, 0.970), 10 % brighter, with 10 % less contrast, with 20 % less colour, warmer, mirrored. Of JPEG of quality 50,
90 % pass; of copies without their outer 2.5 %, 2 %; of the same scene with its subject in another colour, 3.6 %. The
shipped sets' highest are 0.513 (blueprint) and 0.750 (zumi).

A hash of 64 bits (pHash of imagehash 4.3.2, on 2,000 scenes) fails here: at a distance of 4 it takes 94 of a million
pairs for copies and misses 1.7 % of the brighter ones, because it ignores colour, and its bits are noise where an
image is flat.
"""


def thumbnail(image: Image.Image) -> NDArray[np.float32]:
    """An image's detail in colour: 16x16 pixels minus their 5x5 mean, so that changes of tone do not matter.

    Args:
        image: An RGB image of any size.

    Returns:
        (n,), norm 1 and mean 0 in each channel; all zeros for an image of a single colour.
    """
    pixels = np.asarray(image.resize((SIZE_PX, SIZE_PX), Image.Resampling.BOX), dtype=np.float64)
    edge = BOX_PX // 2
    padded = np.pad(pixels, ((edge, edge), (edge, edge), (0, 0)), mode="edge")
    blurred = np.lib.stride_tricks.sliding_window_view(padded, (BOX_PX, BOX_PX), axis=(0, 1)).mean(axis=(-2, -1))
    detail = pixels - blurred
    detail -= detail.mean(axis=(0, 1))
    length = float(np.linalg.norm(detail))
    return np.asarray(detail.flatten() / (length if length > 1 else np.inf), dtype=np.float32)


def near_duplicates(thumbnails: NDArray[np.float32]) -> list[tuple[int, ...]]:
    """Groups of images that are near-duplicates of each other, or of each other's mirror image.

    Args:
        thumbnails: (P, n), from `thumbnail`.

    Returns:
        Indices of every group of two or more, ascending; two images that resemble a third are in one group.
    """
    mirrored = thumbnails.reshape(-1, SIZE_PX, SIZE_PX, 3)[:, :, ::-1].reshape(thumbnails.shape)
    group = np.arange(len(thumbnails))
    # Matrix products of whole blocks: one image at a time, ten thousand images would take minutes.
    for first in range(0, len(thumbnails), _BLOCK):
        block, later = thumbnails[first : first + _BLOCK], slice(first, None)
        similar = np.maximum(block @ thumbnails[later].T, block @ mirrored[later].T) >= MIN_CORRELATION
        for one, other in np.argwhere(similar):
            if one < other:
                group[group == group[first + other]] = group[first + one]
    members = (np.flatnonzero(group == number) for number in dict.fromkeys(group.tolist()))
    return [tuple(found.tolist()) for found in members if len(found) > 1]
