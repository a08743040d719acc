"""Which images meet in which batch: the order of exposures as a function of (seed, epoch)."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from sdlora.common import seeds


@dataclass(frozen=True)
class Exposure:
    """One look at one image.

    Attributes:
        example: Index of the image.
        exposure: The how-manieth look at it in the whole run, from 1.
    """

    example: int
    exposure: int


def epoch_batches(
    buckets: Sequence[Hashable], repeats: int | Sequence[int], batch_size: int, epoch: int, seed: int
) -> list[tuple[Exposure, ...]]:
    """The batches of an epoch.

    Every image is visited exactly as often as its repeats say. A batch holds one bucket; all exposures of a round come
    before those of the next, so that an image meets itself in a batch only at the seam of two rounds. There are as
    many rounds as the most repeated image has exposures; those of the others are spread evenly over them.

    Args:
        buckets: Each image's bucket, by index.
        repeats: Exposures of each image per epoch: one number for all, or one for each.
        batch_size: Images in a batch; what is left over makes a smaller one.
        epoch: From 1.
        seed: The run's seed.

    Returns:
        Batches in the order of training.
    """
    each = [repeats] * len(buckets) if isinstance(repeats, int) else list(repeats)
    num_rounds = max(each, default=0)
    # Images of few repeats begin in different rounds, or all of them would crowd into the same ones.
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
