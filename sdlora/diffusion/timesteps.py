"""How often each timestep is trained: densities over the timesteps, sampled through their inverse CDF; bands of them.

The schedule maps the draws of `stratify`, which decide how evenly they fall, to timesteps. Shapes: T timesteps (1000).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import erf, inf, log, nextafter, sqrt

from sdlora.errors import ConfigError

NUM_TIMESTEPS = 1000
HIGH_NOISE = 800
NUM_BANDS = 5
"""Equal bands of timesteps, in which losses are averaged: how hard prediction is depends on the noise."""
# SpeeD's defaults: each timestep below 700 is drawn five times as often as each of the others.
_SPEED_LIMIT, _SPEED_RATIO = 700, 5


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

    Attributes:
        edges: The CDF at the edges of the timesteps, T + 1 numbers from 0 to 1.

    Raises:
        KeyError: The density is unknown.
        ConfigError: The density is zero between the limits.

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
    ) -> None:
        masses = _logit_normal_masses(mean, std) if name == "logit_normal" else _MASSES[name]()
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
