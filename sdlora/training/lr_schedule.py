"""The learning rate as a function of the step.

Called by the training step.
"""

from __future__ import annotations

import math
from typing import Literal

LrSchedule = Literal["constant", "cosine"]


def learning_rate(step: int, *, total_steps: int, peak: float, schedule: LrSchedule, warmup_steps: int) -> float:
    """The learning rate of one optimizer step.

    Args:
        step: From 1 to `total_steps`.
        total_steps: Steps of the run.
        peak: The highest learning rate.
        schedule: "constant" keeps the peak after the warm-up, "cosine" falls to zero along half a cosine
            (Loshchilov & Hutter 1608.03983, equation 5 without restarts).
        warmup_steps: Steps over which the rate rises linearly to the peak.

    Returns:
        A rate in [0, peak].
    """
    if step <= warmup_steps:
        return peak * step / warmup_steps
    if schedule == "constant":
        return peak
    progress = (step - warmup_steps - 1) / max(1, total_steps - warmup_steps)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))
