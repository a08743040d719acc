"""Which timesteps are trained: densities, sampled through their inverse CDF, and how evenly exposures are spread.

All draws depend on the seed and on the schedule of exposures alone, so that a resumed run, and a run on several
processes, trains every exposure at the same timestep. Shapes: T timesteps (1000).
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import accumulate, pairwise
from math import erf, exp, inf, log, nextafter, sqrt

from sdlora.common import seeds
from sdlora.errors import ConfigError

NUM_TIMESTEPS = 1000
HIGH_NOISE = 800
NUM_BANDS = 5
"""Equal bands of timesteps, in which losses are averaged: how hard prediction is depends on the noise."""
# SpeeD's defaults: each timestep below 700 is drawn five times as often as each of the others.
_SPEED_LIMIT, _SPEED_RATIO = 700, 5

Exposure = tuple[str, int]
"""An image's name, and the number of this exposure of it in the run, from 1."""


def band_of(timestep: int) -> int:
    """The band of a timestep in [0, 999]: 0 for [0, 200), 4 for [800, 1000)."""
    return timestep * NUM_BANDS // NUM_TIMESTEPS


def band_names() -> list[str]:
    """The bands' names: first and last timestep, such as "200-399"."""
    width = NUM_TIMESTEPS // NUM_BANDS
    return [f"{band * width}-{(band + 1) * width - 1}" for band in range(NUM_BANDS)]


@dataclass(frozen=True)
class Draw:
    """A quantile of a density: `offset`, in [0, 1), within slice 0 to `num_slices` - 1 of equal slices of [0, 1)."""

    slice: int
    num_slices: int
    offset: float


class Density:
    """A probability distribution over the T timesteps.

    Args:
        name: "uniform", "logit_normal", "cubic_high", "cubic_low" or "speed".
        mean: Mean of logit_normal's normal distribution.
        std: Its standard deviation, above 0.
        minimum: Lowest timestep, inclusive, 0 to 999.
        maximum: Highest timestep, inclusive, `minimum` to 999.
        high_noise_keep: Factor on the probability of timesteps from 800 up, in (0, 1].
        log_shift: What a flow-matching model's shift of noise levels adds to their logits, ln k; uniform and
            logit_normal alone can be shifted.
        shift_at: That shift for images of a width and a height in pixels, where it depends on them.

    Attributes:
        edges: The CDF at the edges of the timesteps, T + 1 numbers from 0 to 1.

    Raises:
        KeyError: The density is unknown.
        ConfigError: The density is zero between the limits, or is shifted and cannot be.

    Source: logit_normal is Esser et al. 2403.03206, equation 19, on t / T; speed is the asymmetric sampling of Wang
    et al. 2405.17403, with its threshold of 700 and ratio of 5; the cubic ones are t / T = u^3 (towards low noise)
    and 1 - u^3 (towards high noise) for a uniform u.
    """

    def __init__(
        self,
        name: str,
        *,
        mean: float = 0.0,
        std: float = 1.0,
        minimum: int = 0,
        maximum: int = NUM_TIMESTEPS - 1,
        high_noise_keep: float = 1.0,
        log_shift: float = 0.0,
        shift_at: Callable[[tuple[int, int]], float] | None = None,
    ) -> None:
        self._log_shift, self._shift_at = log_shift, shift_at
        same = partial(
            Density, name, mean=mean, std=std, minimum=minimum, maximum=maximum, high_noise_keep=high_noise_keep
        )
        self._shifted = cache(lambda shift: same(log_shift=shift))
        if name == "logit_normal":
            # A shift moves logits (Esser et al. 2403.03206, equation 23).
            masses = _logit_normal_masses(mean + log_shift, std)
        elif log_shift == 0.0:
            masses = _MASSES[name]()
        elif name == "uniform":
            masses = _shifted_uniform_masses(exp(log_shift))
        else:
            raise ConfigError(
                f"timesteps.density = {name!r} is made for noise schedules, and this base model matches flows. Set it "
                "to 'logit_normal' or 'uniform'."
            )
        kept = [
            (mass * high_noise_keep if t >= HIGH_NOISE else mass) if minimum <= t <= maximum else 0.0
            for t, mass in enumerate(masses)
        ]
        total = list(accumulate(kept, initial=0.0))
        if total[-1] <= 0.0:
            raise ConfigError(
                f"timesteps.density = {name!r} with mean {mean:g} and std {std:g} is zero between timesteps.min "
                f"({minimum}) and timesteps.max ({maximum}). Raise std, or move mean or the limits."
            )
        self.edges = [edge / total[-1] for edge in total]

    def at(self, size_px: tuple[int, int]) -> Density:
        """The density for images of a width and a height in pixels."""
        shift = self._log_shift if self._shift_at is None else self._shift_at(size_px)
        return self if shift == self._log_shift else self._shifted(shift)

    def timestep(self, draw: Draw) -> int:
        """The timestep at a draw's quantile.

        A timestep that straddles two slices belongs to the lower one, so that draws in different slices give
        different timesteps as long as slices are wider than a timestep.
        """
        low, high = draw.slice / draw.num_slices, (draw.slice + 1) / draw.num_slices
        # Rounding must not carry an offset of almost 1 into the next slice.
        quantile = min((draw.slice + draw.offset) / draw.num_slices, nextafter(high, 0.0))
        found = bisect_right(self.edges, quantile) - 1
        if self.edges[found] < low and self.edges[found + 1] < high:
            found = bisect_right(self.edges, self.edges[found + 1]) - 1
        return found


def _cubic_masses() -> list[float]:
    """P(t) where t / T = u^3: differences of the CDF x^(1/3)."""
    edges = [(t / NUM_TIMESTEPS) ** (1 / 3) for t in range(NUM_TIMESTEPS + 1)]
    return [high - low for low, high in pairwise(edges)]


def _shifted_uniform_masses(k: float) -> list[float]:
    """P(t) where t / T = k u / (1 + (k - 1) u) for a uniform u: differences of the CDF x / (k - (k - 1) x)."""
    edges = [x / (k - (k - 1) * x) for x in (t / NUM_TIMESTEPS for t in range(NUM_TIMESTEPS + 1))]
    return [high - low for low, high in pairwise(edges)]


def _logit_normal_masses(mean: float, std: float) -> list[float]:
    """P(t) where t / T is the logistic function of a normal variable: differences of the CDF."""

    def cdf(x: float) -> float:
        logit = -inf if x <= 0 else inf if x >= 1 else log(x / (1 - x))
        return 0.5 * (1 + erf((logit - mean) / (std * sqrt(2))))

    edges = [cdf(t / NUM_TIMESTEPS) for t in range(NUM_TIMESTEPS + 1)]
    return [high - low for low, high in pairwise(edges)]


# Unnormalized probabilities of the T timesteps.
_MASSES: dict[str, Callable[[], list[float]]] = {
    "uniform": lambda: [1.0] * NUM_TIMESTEPS,
    "cubic_high": lambda: _cubic_masses()[::-1],
    "cubic_low": _cubic_masses,
    "speed": lambda: [float(_SPEED_RATIO if t < _SPEED_LIMIT else 1) for t in range(NUM_TIMESTEPS)],
}


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
