"""Five equal bands of timesteps, in which losses are averaged separately: how hard prediction is depends on the noise.

The trainer fills them in, the report and the copy check read them.
"""

from __future__ import annotations

from sdlora.diffusion.timesteps import NUM_TIMESTEPS

NUM_BANDS = 5


def band_of(timestep: int) -> int:
    """The band of a timestep in [0, 999]: 0 for [0, 200), 4 for [800, 1000)."""
    return timestep * NUM_BANDS // NUM_TIMESTEPS


def band_names() -> list[str]:
    """The bands' names: first and last timestep, such as "200-399"."""
    width = NUM_TIMESTEPS // NUM_BANDS
    return [f"{band * width}-{(band + 1) * width - 1}" for band in range(NUM_BANDS)]
