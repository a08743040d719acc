"""The processes that train one LoRA together; with a single process everything here does nothing.

Used by the training step and the run. Every process computes its share of each batch, and gradients are summed, so the
batch is the same for any number of processes. Only the main process writes, draws and validates; the others wait.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor, nn

from sdlora.errors import ConfigError, ProcessLostError

T = TypeVar("T")
# The others wait while the main process draws previews, which takes long with a large base model.
_PATIENCE = timedelta(hours=24)


class Processes:
    """One process among the `count` of a run, counted from 0, the main process.

    Processes agree in the group `control`, None for a single process.
    """

    def __init__(self, index: int = 0, count: int = 1, control: dist.ProcessGroup | None = None) -> None:
        self.index, self.count, self._control = index, count, control

    @property
    def is_main(self) -> bool:
        """Whether this process writes the run's folder."""
        return self.index == 0

    @property
    def alone(self) -> bool:
        """Whether this is the only process."""
        return self.count == 1

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This process's share of a batch: every `count`-th item from its index on; possibly none."""
        return items[self.index :: self.count]

    def placed(self, own: Tensor, length: int) -> Tensor:
        """Values of this process's share, (n,), at their positions in the whole batch, (length,); zeros elsewhere."""
        if self.alone:
            return own
        whole = own.new_zeros(length)
        whole[self.index :: self.count] = own
        return whole

    def summed(self, values: Tensor) -> Tensor:
        """The sum of a tensor over all processes."""
        if not self.alone:
            _exchange(lambda: dist.all_reduce(values))
        return values

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace gradients by their sums over all processes in one exchange; a missing gradient is zero."""
        if self.alone:
            return
        listed = list(parameters)
        for parameter in listed:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in listed if parameter.grad is not None]
        flat = self.summed(torch.cat([gradient.flatten() for gradient in gradients]))
        first = 0
        for gradient in gradients:
            gradient.copy_(flat[first : first + gradient.numel()].view_as(gradient))
            first += gradient.numel()

    def any(self, value: bool) -> bool:
        """Whether a condition holds in any process."""
        if self.alone:
            return value
        total = torch.tensor(int(value))
        _exchange(lambda: dist.all_reduce(total, group=self._control))
        return bool(total)

    def agree(self, value: T) -> T:
        """The main process's value, in all processes; the others wait for it."""
        if self.alone:
            return value
        box: list[T] = [value]
        _exchange(lambda: dist.broadcast_object_list(box, src=0, group=self._control))
        return box[0]

    def leave(self) -> None:
        """Leave the group of processes, after the last exchange."""
        if not self.alone and dist.is_initialized():
            dist.destroy_process_group()


ALONE = Processes()


def join(device: str) -> Processes:
    """Join the other processes that a launcher (`accelerate launch`, `torchrun`) started, by `train.device`.

    Raises:
        ConfigError: The device is one for all of them.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched == 1:
        return ALONE
    if ":" in device:
        raise ConfigError(
            f"train.device = {device!r} names one device for {launched} processes. Use 'auto', which gives each its "
            "own."
        )
    state = PartialState(cpu=device == "cpu" or not torch.cuda.is_available(), timeout=_PATIENCE)
    # A group of its own on the CPU, so that waiting does not occupy a GPU.
    control = dist.new_group(backend="gloo", timeout=_PATIENCE)
    return Processes(state.process_index, state.num_processes, control)


def _exchange(communicate: Callable[[], object]) -> None:
    try:
        communicate()
    except RuntimeError as error:
        raise ProcessLostError(
            "Another process of this run has ended; its own message says why. To resume from the last checkpoint, with "
            "any number of processes, add --resume to the same command."
        ) from error
