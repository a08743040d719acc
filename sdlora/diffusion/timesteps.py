"""Which noise level a visit of a picture is trained at.

Floor 2. A density is a function from a uniform number to a timestep (its inverse CDF), so that how much each noise
level is trained and how evenly the visits fall stay two separate choices. A new density is one more function here.
"""

from __future__ import annotations

from collections.abc import Callable

from sdlora import seeds

InverseCdf = Callable[[float], float]


def uniform_density(quantile: float) -> float:
    """Every noise level alike: the identity on [0, 1)."""
    return quantile


DENSITIES: dict[str, InverseCdf] = {"uniform": uniform_density}


def timestep(density: str, minimum: int, maximum: int, *, seed: int, example: str, visit: int) -> int:
    """The timestep of one visit: a pure function of (seed, example, visit).

    Args:
        density: A name in `DENSITIES`.
        minimum: Lowest timestep, inclusive, 0 to 999.
        maximum: Highest timestep, inclusive, `minimum` to 999.
        seed: The run's seed.
        example: The picture's name.
        visit: The how-manieth visit of that picture in the whole run, from 1.

    Returns:
        An integer in [minimum, maximum].
    """
    quantile = seeds.uniform(seed, "timestep", example, visit)
    share = DENSITIES[density](quantile)
    return minimum + min(int(share * (maximum - minimum + 1)), maximum - minimum)
