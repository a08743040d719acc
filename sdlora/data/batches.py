"""The order of exposures and the batches of an epoch, as a function of (seed, epoch).

The schedule of a run in `training` is made of these batches.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from sdlora.common import seeds


@dataclass(frozen=True)
class Exposure:
    """One look at one image.

    Attributes:
        example: Index of the image.
        number: Counts the exposures of this image over the whole run, from 1.
    """

    example: int
    number: int


def epoch_batches(
    buckets: Sequence[Hashable], repeats: int | Sequence[int], batch_size: int, epoch: int, seed: int
) -> list[tuple[Exposure, ...]]:
    """The batches of an epoch, in which every image has exactly as many exposures as its repeats.

    All images of a batch are in one bucket. Exposures come in rounds, as many as the most repeated image has
    exposures; those of the other images are spread evenly over the rounds. A round ends before the next begins, so an
    image can be in a batch twice only where two rounds meet.

    Args:
        buckets: Bucket of each image, by index.
        repeats: Exposures of each image per epoch: one number for all images, or one for each.
        batch_size: Images in a batch; the last batch of a bucket may be smaller.
        epoch: From 1.
        seed: The run's seed.

    Returns:
        Batches in the order of training.
    """
    each = [repeats] * len(buckets) if isinstance(repeats, int) else list(repeats)
    num_rounds = max(each, default=0)
    # Images with few repeats start in different rounds, or they would all fall into the same ones.
    starts = [seeds.derive(seed, "first round", epoch, index) % num_rounds for index in range(len(each))]

    def exposures_before(index: int, round_: int) -> int:
        return (round_ + starts[index]) * each[index] // num_rounds - starts[index] * each[index] // num_rounds

    groups: dict[Hashable, list[int]] = {}
    for index, bucket in enumerate(buckets):
        groups.setdefault(bucket, []).append(index)
    batches: list[tuple[Exposure, ...]] = []
    for number, members in enumerate(groups.values()):
        exposures: list[Exposure] = []
        for round_ in range(1, num_rounds + 1):
            present = [i for i in members if exposures_before(i, round_) > exposures_before(i, round_ - 1)]
            order = seeds.permutation(len(present), seed, "order", epoch, round_, number)
            met = [present[place] for place in order]
            exposures += [Exposure(index, (epoch - 1) * each[index] + exposures_before(index, round_)) for index in met]
        batches += [tuple(exposures[first : first + batch_size]) for first in range(0, len(exposures), batch_size)]
    if len(groups) == 1:
        return batches
    return [batches[index] for index in seeds.permutation(len(batches), seed, "batch order", epoch)]
