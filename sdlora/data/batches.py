"""Which images are trained together, at which size and in which order.

Aspect-ratio buckets are a few training sizes, so that wide and tall images lose little to the crop; all images of a
batch are in one bucket. The schedule of a run in `training` is made of the batches of each epoch.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import NamedTuple

from sdlora.common import seeds
from sdlora.common.bundled import BucketOptions

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


def assign_buckets(sizes: Sequence[Bucket], resolution_px: int, options: BucketOptions) -> list[Bucket]:
    """The bucket of each image.

    Args:
        sizes: Width and height of each image in pixels.
        resolution_px: Edge of the square; see `make_buckets`.
    """
    step_px, max_aspect = options.step_px, options.max_aspect if options.buckets else 1.0
    square = [(resolution_px, resolution_px)]
    choices = make_buckets(resolution_px, step_px, max_aspect) if options.buckets else square
    found = [choose_bucket(*size, choices) for size in sizes]
    if not options.no_upscale:
        return found
    return [
        bucket if size[0] >= bucket[0] and size[1] >= bucket[1] else _filled_bucket(size, bucket, step_px, max_aspect)
        for size, bucket in zip(sizes, found, strict=True)
    ]


def _filled_bucket(size: Bucket, bucket: Bucket, step_px: int, max_aspect: float) -> Bucket:
    """The largest size in steps that an image fills, no edge of it above its bucket's and none below a step."""
    short, long = sorted(
        max(step_px, min(edge, most) // step_px * step_px) for edge, most in zip(size, bucket, strict=True)
    )
    long = min(long, int(short * max_aspect) // step_px * step_px)
    return (short, long) if size[0] < size[1] else (long, short)


class Exposure(NamedTuple):
    """One look at the image with the index `example`; `number` counts its exposures over the whole run, from 1."""

    example: int
    number: int


def count_batches(buckets: Sequence[Sequence[Hashable]], repeats: Sequence[int], batch_size: int, epoch: int) -> int:
    """The number of batches that `epoch_batches` gives, without drawing their order."""
    exposures: Counter[Hashable] = Counter()
    for own, times in zip(buckets, repeats, strict=True):
        for place, bucket in enumerate(own):
            # Exposures before the end of the epoch that have this bucket, less those before its start.
            last, first = (
                (number - place + len(own) - 1) // len(own) for number in (epoch * times, (epoch - 1) * times)
            )
            exposures[bucket] += last - first
    return sum(-(-number // batch_size) for number in exposures.values())


def epoch_batches(
    buckets: Sequence[Sequence[Hashable]], repeats: int | Sequence[int], batch_size: int, epoch: int, seed: int
) -> list[tuple[Exposure, ...]]:
    """The batches of an epoch in the order of training; every image has exactly as many exposures as its repeats.

    All images of a batch are in one bucket. Exposures come in rounds, as many as the most repeated image has
    exposures; those of the other images are spread evenly over the rounds. A round ends before the next begins, so an
    image can be in a batch twice only where two rounds meet.

    Args:
        buckets: The bucket of each image, by index, or several that its exposures have in turn.
        repeats: Exposures of each image per epoch: one number for all images, or one for each.
        batch_size: Images in a batch; the last batch of a bucket may be smaller.
        epoch: From 1.
        seed: The run's seed.
    """
    each = [repeats] * len(buckets) if isinstance(repeats, int) else list(repeats)
    num_rounds = max(each, default=0)
    # Images with few repeats start in different rounds, or they would all fall into the same ones.
    starts = [seeds.derive(seed, "first round", epoch, index) % num_rounds for index in range(len(each))]

    def exposures_before(index: int, round_: int) -> int:
        return (round_ + starts[index]) * each[index] // num_rounds - starts[index] * each[index] // num_rounds

    groups: dict[Hashable, list[int]] = {}
    for index, own in enumerate(buckets):
        groups.setdefault(frozenset(own), []).append(index)
    exposures: dict[Hashable, list[Exposure]] = {}
    for number, members in enumerate(groups.values()):
        for round_ in range(1, num_rounds + 1):
            present = [i for i in members if exposures_before(i, round_) > exposures_before(i, round_ - 1)]
            order = seeds.permutation(len(present), seed, "order", epoch, round_, number)
            met = [present[place] for place in order]
            for index in met:
                exposure = Exposure(index, (epoch - 1) * each[index] + exposures_before(index, round_))
                own = buckets[index]
                exposures.setdefault(own[(exposure.number - 1) % len(own)], []).append(exposure)
    batches = [
        tuple(alike[first : first + batch_size])
        for alike in exposures.values()
        for first in range(0, len(alike), batch_size)
    ]
    if len(exposures) == 1:
        return batches
    return [batches[index] for index in seeds.permutation(len(batches), seed, "batch order", epoch)]
