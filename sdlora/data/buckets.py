"""Aspect-ratio buckets: the few sizes that images are trained at, so that none is cropped much.

Pure arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

Bucket = tuple[int, int]
"""Width and height in pixels."""


def make_buckets(resolution_px: int, step_px: int, max_aspect: float = 2.0) -> list[Bucket]:
    """All sizes of about a square's area, up to an aspect ratio.

    Args:
        resolution_px: Edge of the square whose area no bucket exceeds.
        step_px: Widths and heights are multiples of this (the square itself is kept as it is).
        max_aspect: The longer edge over the shorter, at least 1.

    Returns:
        Sizes from tall to wide, the square among them; for every width the tallest that fits.
    """
    found = {(resolution_px, resolution_px)}
    for short in range(step_px, resolution_px + 1, step_px):
        long = resolution_px**2 // short // step_px * step_px
        if short <= long <= short * max_aspect:
            found |= {(short, long), (long, short)}
    return sorted(found)


def choose_bucket(width: int, height: int, buckets: Sequence[Bucket]) -> Bucket:
    """The bucket whose aspect ratio is nearest (by the ratio of ratios), the larger one of two alike."""
    aspect = math.log(width / height)
    return min(buckets, key=lambda b: (round(abs(math.log(b[0] / b[1]) - aspect), 9), -b[0] * b[1]))


def assign_buckets(sizes: Sequence[Bucket], resolution_px: int, step_px: int, *, buckets: bool) -> list[Bucket]:
    """The bucket of each image.

    Args:
        sizes: The images' own widths and heights in pixels.
        resolution_px: Edge of the square that sets the area of buckets.
        step_px: Step of the buckets' sizes.
        buckets: False crops everything to the square.
    """
    choices = make_buckets(resolution_px, step_px) if buckets else [(resolution_px, resolution_px)]
    return [choose_bucket(*size, choices) for size in sizes]
