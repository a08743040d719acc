"""How evenly exposures are spread over the timesteps: independently, within each step, or over each image as well.

All draws depend on the seed and on the schedule of exposures alone, so that a resumed run, and a run on several
processes, trains every exposure at the same timestep.
"""

from __future__ import annotations

import random
from collections.abc import Hashable, Sequence

from sdlora.common import seeds
from sdlora.diffusion.timesteps import Draw

Exposure = tuple[str, int]
"""An image's name, and the number of this exposure of it in the run, from 1."""


def cover(coverage: str, steps: Sequence[Sequence[Exposure]], seed: int) -> list[list[Draw]]:
    """The quantile of a density at which every exposure of a run is trained.

    Args:
        coverage: "none" draws independently, "batch" spreads each step's exposures, "image" each image's as well.
        steps: The exposures of each optimizer step, in the order of training; each exposure occurs once.
        seed: The run's seed.

    Returns:
        A draw per exposure, in the same order.

    Raises:
        KeyError: The coverage is unknown.
    """
    if coverage == "none":
        return [[Draw(0, 1, seeds.uniform(seed, "timestep", *exposure)) for exposure in step] for step in steps]
    return {"batch": _spread_in_steps, "image": _spread_over_images}[coverage](steps, seed)


def _spread_in_steps(steps: Sequence[Sequence[Exposure]], seed: int) -> list[list[Draw]]:
    """u_i = (u_0 + i / B) mod 1 over the B exposures of a step.

    Source: the low-discrepancy sampler of Kingma et al. 2107.00630.
    """
    draws: list[list[Draw]] = []
    for number, step in enumerate(steps):
        first = seeds.uniform(seed, "step offset", number)
        draws.append([Draw(0, 1, (first + i / len(step)) % 1) for i in range(len(step))])
    return draws


def _spread_over_images(steps: Sequence[Sequence[Exposure]], seed: int) -> list[list[Draw]]:
    """Put each image's V exposures into V equal slices, one into each, and spread each step's exposures as well.

    The exposures are the edges of a graph between images and steps. Repeated halving, such that the edges of every
    image and of every step are split evenly (or differ by one), gives each edge the binary digits of a place in [0, 1).
    An image's slices are the ranks of its exposures' places; the offset inside a slice is the exposure's place, rotated
    by a number that all exposures of a step share.
    """
    edges = [(exposure, number) for number, step in enumerate(steps) for exposure in step]
    exposures_of: dict[str, list[int]] = {}
    for index, ((name, _), _) in enumerate(edges):
        exposures_of.setdefault(name, []).append(index)
    finest = max([len(step) for step in steps] + [len(indices) for indices in exposures_of.values()], default=1)
    places = _balanced_places([name for (name, _), _ in edges], [n for _, n in edges], (finest - 1).bit_length(), seed)
    slices = [0] * len(edges)
    for indices in exposures_of.values():
        for rank, index in enumerate(sorted(indices, key=lambda i: places[i])):
            slices[index] = rank
    draws: list[list[Draw]] = [[] for _ in steps]
    for index, ((name, _), number) in enumerate(edges):
        num_slices = len(exposures_of[name])
        offset = (places[index] * num_slices + seeds.uniform(seed, "step offset", number)) % 1
        draws[number].append(Draw(slices[index], num_slices, offset))
    return draws


def _balanced_places(images: Sequence[str], steps: Sequence[int], depth: int, seed: int) -> list[float]:
    """The place of every edge in [0, 1), to `depth` binary digits."""
    rng = random.Random(seeds.derive(seed, "coverage"))
    parts = [list(range(len(images)))]
    places = [0.0] * len(images)
    for level in range(1, depth + 1):
        halves: list[list[int]] = []
        for part in parts:
            upper = _halve([images[i] for i in part], [steps[i] for i in part], rng)
            halves.append([i for i, up in zip(part, upper, strict=True) if not up])
            halves.append([i for i, up in zip(part, upper, strict=True) if up])
            for index in halves[-1]:
                places[index] += 0.5**level
        parts = halves
    return places


def _halve(images: Sequence[Hashable], steps: Sequence[Hashable], rng: random.Random) -> list[bool]:
    """Split edges into two halves such that the edges of every image and of every step are split evenly, within one.

    Edges are paired at their images (consecutive exposures, cyclically, from a random first one, so that every exposure
    is equally likely to be left over) and at their steps (at random), and the two of a pair go to different halves. An
    edge has at most one partner of each kind, so the pairs form paths and cycles of even length, and following them
    with alternating kinds never leads to a contradiction.
    """
    count = len(images)
    first = rng.randrange(count) if count else 0
    in_turn = [(first + i) % count for i in range(count)]
    partners = (_pairs(images, in_turn), _pairs(steps, rng.sample(range(count), count)))
    upper: list[bool | None] = [None] * count
    for start in range(count):
        if upper[start] is not None:
            continue
        side = upper[start] = rng.random() < 0.5
        for kind in (0, 1):
            edge, turn, here = partners[kind].get(start), 1 - kind, side
            while edge is not None and upper[edge] is None:
                here = upper[edge] = not here
                edge, turn = partners[turn].get(edge), 1 - turn
    return [bool(up) for up in upper]


def _pairs(nodes: Sequence[Hashable], order: Sequence[int]) -> dict[int, int]:
    """Pair the edges of each node in an order; the last edge of an odd number has no partner."""
    waiting: dict[Hashable, int] = {}
    partner: dict[int, int] = {}
    for edge in order:
        other = waiting.pop(nodes[edge], None)
        if other is None:
            waiting[nodes[edge]] = edge
        else:
            partner[edge], partner[other] = other, edge
    return partner
