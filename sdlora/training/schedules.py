"""Learning rate schedules: the rate of every optimizer step, as a function of the step alone, so that resume is exact.

The training step asks for each step's rate; estimates draw the whole course.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from sdlora.training.settings import LrSchedule, TrainingSettings

# The share of the peak where a share x in [0, 1) of the steps after the warm-up is over, by cycles and power.
_SHAPES: dict[str, Callable[[float, int, float], float]] = {
    "constant": lambda x, cycles, power: 1.0,
    "linear": lambda x, cycles, power: 1 - x,
    "cosine": lambda x, cycles, power: 0.5 * (1 + math.cos(math.pi * x)),
    # Loshchilov & Hutter 1608.03983, equation 5, in cycles of equal length.
    "cosine_restarts": lambda x, cycles, power: 0.5 * (1 + math.cos(math.pi * (x * cycles % 1))),
    "polynomial": lambda x, cycles, power: (1 - x) ** power,
    # Chen et al. 2107.04197, section 3.3.
    "rex": lambda x, cycles, power: (1 - x) / (0.5 + 0.5 * (1 - x)),
}


@dataclass(frozen=True)
class Schedule:
    """The course of the learning rate over a run.

    Attributes:
        peak: The highest learning rate.
        kind: "constant" keeps the peak after the warm-up, all others fall.
        warmup: Steps over which the rate rises linearly to the peak; below 1 a share of all steps.
        cycles: How often "cosine_restarts" falls.
        power: Of "polynomial".
        floor: Share of the peak at which a falling rate ends, in [0, 1).
    """

    peak: float
    kind: LrSchedule = "constant"
    warmup: float = 0
    cycles: int = 1
    power: float = 1.0
    floor: float = 0.0

    @classmethod
    def of(cls, settings: TrainingSettings) -> Schedule:
        """The schedule of a run's settings."""
        return cls(
            settings.learning_rate,
            settings.lr_schedule,
            settings.warmup_steps,
            settings.lr_cycles,
            settings.lr_power,
            settings.lr_floor,
        )

    def warmup_steps(self, total_steps: int) -> int:
        """The steps of the warm-up in a run of this length."""
        return round(self.warmup * total_steps) if 0 < self.warmup < 1 else int(self.warmup)

    def rate(self, step: int, total_steps: int) -> float:
        """The learning rate of an optimizer step from 1 to `total_steps`, in [0, peak]."""
        warmup = self.warmup_steps(total_steps)
        if step <= warmup:
            return self.peak * step / warmup
        progress = (step - warmup - 1) / max(1, total_steps - warmup)
        share = _SHAPES[self.kind](progress, self.cycles, self.power)
        if self.kind == "constant":
            return self.peak
        return self.peak * share if self.floor == 0 else self.peak * (self.floor + (1 - self.floor) * share)
