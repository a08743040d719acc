"""Which pictures meet in which batch: the order of visits as a function of (seed, epoch).

Floor 2.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from sdlora import seeds


@dataclass(frozen=True)
class Visit:
    """One look at one picture.

    Attributes:
        example: Index of the picture.
        visit: The how-manieth look at it in the whole run, from 1.
    """

    example: int
    visit: int


def epoch_batches(
    buckets: Sequence[Hashable], repeats: int, batch_size: int, epoch: int, seed: int
) -> list[tuple[Visit, ...]]:
    """The batches of an epoch.

    Every picture is visited exactly `repeats` times. A batch holds one bucket; all visits of a round come before
    those of the next, so that a picture meets itself in a batch only at the seam of two rounds.

    Args:
        buckets: Each picture's bucket, by index.
        repeats: Visits of each picture per epoch.
        batch_size: Pictures in a batch; what is left over makes a smaller one.
        epoch: From 1.
        seed: The run's seed.

    Returns:
        Batches in the order of training.
    """
    groups: dict[Hashable, list[int]] = {}
    for index, bucket in enumerate(buckets):
        groups.setdefault(bucket, []).append(index)
    batches: list[tuple[Visit, ...]] = []
    for number, members in enumerate(groups.values()):
        visits: list[Visit] = []
        for round_ in range(1, repeats + 1):
            order = seeds.permutation(len(members), seed, "order", epoch, round_, number)
            visits += [Visit(members[index], (epoch - 1) * repeats + round_) for index in order]
        batches += [tuple(visits[first : first + batch_size]) for first in range(0, len(visits), batch_size)]
    if len(groups) == 1:
        return batches
    return [batches[index] for index in seeds.permutation(len(batches), seed, "batch order", epoch)]
