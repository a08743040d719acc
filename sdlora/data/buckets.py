"""Aspect-ratio buckets: a few training sizes, so that wide and tall images lose little to the crop.

Pure arithmetic; `Dataset.with_buckets` assigns them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

Bucket = tuple[int, int]
"""Width and height in pixels."""


def make_buckets(resolution_px: int, step_px: int, max_aspect: float = 2.0) -> list[Bucket]:
    """The training sizes of about the same area as a square.

    Args:
        resolution_px: Edge of the square, whose area no bucket exceeds.
        step_px: Widths and heights are multiples of this, except those of the square itself.
        max_aspect: Longest edge divided by the shortest, at least 1.

    Returns:
        Sizes from tall to wide, including the square; for every width the tallest that fits.
    """
    found = {(resolution_px, resolution_px)}
    for short in range(step_px, resolution_px + 1, step_px):
        long = resolution_px**2 // short // step_px * step_px
        if short <= long <= short * max_aspect:
            found |= {(short, long), (long, short)}
    return sorted(found)


def choose_bucket(width: int, height: int, buckets: Sequence[Bucket]) -> Bucket:
    """The bucket with the nearest aspect ratio (by the ratio of the two), the larger one of two equally near."""
    aspect = math.log(width / height)
    return min(buckets, key=lambda b: (round(abs(math.log(b[0] / b[1]) - aspect), 9), -b[0] * b[1]))


def assign_buckets(sizes: Sequence[Bucket], resolution_px: int, step_px: int, *, buckets: bool) -> list[Bucket]:
    """The bucket of each image.

    Args:
        sizes: Width and height of each image in pixels.
        resolution_px: Edge of the square that sets the buckets' area.
        step_px: Widths and heights of buckets are multiples of this.
        buckets: False crops all images to the square.
    """
    choices = make_buckets(resolution_px, step_px) if buckets else [(resolution_px, resolution_px)]
    return [choose_bucket(*size, choices) for size in sizes]
