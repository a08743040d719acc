"""The weights that are judged and kept, where they are not the ones that are trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class MovingAverage:
    """An exponential moving average of parameters.

    Args:
        parameters: What is averaged; the average starts at their values.
        decay: The most that is kept of the old average, in (0, 1).
    """

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float) -> None:
        self.parameters = parameters
        self.decay = decay
        self.values: list[Tensor] = [parameter.detach().clone() for parameter in parameters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the parameters after an optimizer step: average = d * average + (1 - d) * parameter.

        Args:
            step: From 1; d = min(decay, (1 + step) / (10 + step)), so that the first steps do not cling to the start.

        Source: Polyak & Juditsky 1992; the warm-up is that of TensorFlow's ExponentialMovingAverage (`num_updates`).
        """
        decay = min(self.decay, (1 + step) / (10 + step))
        for value, parameter in zip(self.values, self.parameters, strict=True):
            value.lerp_(parameter, 1 - decay)


@contextmanager
def evaluation_weights(
    parameters: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer, average: MovingAverage | None
) -> Iterator[None]:
    """Put the weights that are judged into the parameters for the length of the block.

    Args:
        parameters: Get back exactly the values they had.
        optimizer: Goes into evaluation mode and back where it has one, as schedule-free optimizers do.
        average: Its values are used; None leaves it to the optimizer.

    Source: of schedule-free optimizers, Defazio et al. 2405.15682: gradients are taken at y, x is what is judged.
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
        # Going back by the optimizer's own arithmetic would round, and a resumed run would differ.
        _copy(before, parameters)


@torch.no_grad()
def _copy(values: Sequence[Tensor], parameters: Sequence[nn.Parameter]) -> None:
    for value, parameter in zip(values, parameters, strict=True):
        parameter.copy_(value)
