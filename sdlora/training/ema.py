"""The weights that are evaluated and exported, where they differ from those being trained: averages.

Updated after every training step, swapped in at the end of every epoch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class MovingAverage:
    """An exponential moving average of parameters, which starts at their values.

    At most a share `decay` in (0, 1) of the old average is kept.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float) -> None:
        self.parameters = parameters
        self.decay = decay
        self.values: list[Tensor] = [parameter.detach().clone() for parameter in parameters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Update after an optimizer step, from 1: average = d * average + (1 - d) * parameter.

        d = min(decay, (1 + step) / (10 + step)), so that the start is soon forgotten.

        Source: Polyak & Juditsky 1992; the warm-up is that of TensorFlow's ExponentialMovingAverage (`num_updates`).
        """
        decay = min(self.decay, (1 + step) / (10 + step))
        for value, parameter in zip(self.values, self.parameters, strict=True):
            value.lerp_(parameter, 1 - decay)


@contextmanager
def evaluation_weights(
    parameters: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer, average: MovingAverage | None
) -> Iterator[None]:
    """Put the weights to evaluate into the parameters for the length of the block.

    Args:
        parameters: Restored exactly at the end.
        optimizer: Switched to evaluation mode and back if it has one, as schedule-free optimizers do.
        average: Its values are used; None leaves them to the optimizer.

    Source: schedule-free optimizers, Defazio et al. 2405.15682: gradients are taken at y, and x is evaluated.
    """
    before = [parameter.detach().clone() for parameter in parameters]
    has_modes = any("train_mode" in options for options in optimizer.param_groups)
    try:
        if has_modes:
            optimizer.eval()  # type: ignore[attr-defined]
        if average is not None:
            _copy(average.values, parameters)
        yield
    finally:
        if has_modes:
            optimizer.train()  # type: ignore[attr-defined]
        # The optimizer's own way back rounds, and a resumed run would differ.
        _copy(before, parameters)


@torch.no_grad()
def _copy(values: Sequence[Tensor], parameters: Sequence[nn.Parameter]) -> None:
    for value, parameter in zip(values, parameters, strict=True):
        parameter.copy_(value)
