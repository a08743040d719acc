"""Stops training when numbers are no longer finite, before they are saved anywhere.

Waiting for a GPU at every step would slow it down, so its answer to one step is read after the next.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sdlora.errors import DivergedError


@dataclass(frozen=True)
class _Seen:
    step: int
    rate: float
    values: Tensor
    copied: torch.cuda.Event | None


class Watch:
    """Looks at a loss and a gradient's norm after every step."""

    def __init__(self) -> None:
        self._seen: _Seen | None = None

    def see(self, step: int, rate: float, loss: Tensor, gradient_norm: Tensor | None) -> None:
        """Take in a step; on a CPU it is judged at once, on a GPU when the next one comes or `judge` is called.

        Args:
            step: From 1.
            rate: Its learning rate, for the message.
            loss: Any shape.
            gradient_norm: A scalar; None where infinite gradients are part of the plan, as under loss scaling.

        Raises:
            DivergedError: This step's numbers, or the step's before, are not finite.
        """
        self.judge()
        values = torch.stack([loss.detach().sum(), loss.new_zeros(()) if gradient_norm is None else gradient_norm])
        if values.device.type != "cuda":
            self._seen = _Seen(step, rate, values, None)
            self.judge()
            return
        host = torch.empty(2, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)
        copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        copied.record()
        self._seen = _Seen(step, rate, host, copied)

    def judge(self) -> None:
        """Judge the step that was seen last.

        Raises:
            DivergedError: Its numbers are not finite.
        """
        seen, self._seen = self._seen, None
        if seen is None:
            return
        if seen.copied is not None:
            seen.copied.synchronize()
        for what, value in zip(("loss", "gradient"), seen.values.tolist(), strict=True):
            if not torch.isfinite(torch.tensor(value)):
                raise DivergedError(
                    f"The {what} became {value} at step {seen.step} (learning rate {seen.rate:g}). Lower "
                    "train.learning_rate, or set train.precision to 'fp32'."
                )


def check_finite(named: Mapping[str, Iterable[Tensor]], step: int) -> None:
    """Look at everything that a checkpoint or a file would hold.

    Args:
        named: What is looked at, such as "adapter".
        step: After which.

    Raises:
        DivergedError: Any number is NaN or infinite.
    """
    for name, tensors in named.items():
        found = [tensor.isfinite().all() for tensor in tensors]
        if found and not bool(torch.stack(found).all()):
            raise DivergedError(
                f"The {name} holds NaN or infinite numbers after step {step}. Nothing of it is saved. Lower "
                "train.learning_rate."
            )
