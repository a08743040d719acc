"""Stops training as soon as a value is NaN or infinite, before it is saved anywhere.

Called by the training step. Waiting for a GPU at every step would slow training down, so a step's values are checked
after the next step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from sdlora.errors import DivergedError


class DivergenceCheck:
    """Checks the loss and the gradient norm of every step."""

    def __init__(self) -> None:
        # Step, learning rate, the two values, and when they are on the host.
        self._pending: tuple[int, float, Tensor, torch.cuda.Event | None] | None = None

    def observe(self, step: int, learning_rate: float, losses: Tensor, gradient_norm: Tensor | None) -> None:
        """Take the values of a step; checked at once on a CPU, on a GPU with the next step or `check_pending`.

        The gradient norm, a scalar, is None where infinite gradients are expected, as under loss scaling.

        Raises:
            DivergedError: A value of this step, or of the one before it, is not finite.
        """
        self.check_pending()
        values = torch.stack([losses.detach().sum(), losses.new_zeros(()) if gradient_norm is None else gradient_norm])
        if values.device.type != "cuda":
            self._pending = (step, learning_rate, values, None)
            self.check_pending()
            return
        host = torch.empty(2, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)
        copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        copied.record()
        self._pending = (step, learning_rate, host, copied)

    def check_pending(self) -> None:
        """Check the last step, if that was not done yet; raises as `observe` does."""
        if self._pending is None:
            return
        (step, learning_rate, values, copied), self._pending = self._pending, None
        if copied is not None:
            copied.synchronize()
        for what, value in zip(("loss", "gradient"), values.tolist(), strict=True):
            if not math.isfinite(value):
                raise DivergedError(
                    f"The {what} became {value} at step {step} (learning rate {learning_rate:g}). Lower "
                    "train.learning_rate, or set train.precision to 'fp32'."
                )


def check_finite(named: Mapping[str, Iterable[Tensor]], step: int) -> None:
    """Check everything that a checkpoint or a file would hold after a step, by a name such as "adapter".

    Raises:
        DivergedError: Any value is NaN or infinite.
    """
    for name, tensors in named.items():
        found = [tensor.isfinite().all() for tensor in tensors]
        if found and not bool(torch.stack(found).all()):
            raise DivergedError(
                f"The {name} holds NaN or infinite values after step {step}. Nothing of it is saved. Lower "
                "train.learning_rate."
            )
