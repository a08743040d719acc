"""Five equal bands of timesteps, in which losses are told apart: what is hard differs with the noise."""

from __future__ import annotations

from sdlora.diffusion.timesteps import NUM_TIMESTEPS

NUM_BANDS = 5


def band_of(timestep: int) -> int:
    """The band of a timestep in [0, 999]: 0 for [0, 200), 4 for [800, 1000)."""
    return timestep * NUM_BANDS // NUM_TIMESTEPS


def band_names() -> list[str]:
    """The bands' first and last timesteps, such as "200-399"."""
    width = NUM_TIMESTEPS // NUM_BANDS
    return [f"{band * width}-{(band + 1) * width - 1}" for band in range(NUM_BANDS)]
