"""The processes that train one LoRA together; usually it is one alone, and then nothing here does anything.

Every process computes its share of each batch, and gradients are summed, so that the batch is the same
whatever the number of processes. Only the main one writes, draws and judges; meanwhile the others wait.
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
# While the main process draws previews the others wait, and a large base draws for long.
_PATIENCE = timedelta(hours=24)


class Processes:
    """One process among those of a run.

    Args:
        index: Which one, from 0, the main process.
        count: How many there are.
        control: What they agree over; None for one alone.
    """

    def __init__(self, index: int = 0, count: int = 1, control: dist.ProcessGroup | None = None) -> None:
        self.index, self.count, self._control = index, count, control

    @property
    def is_main(self) -> bool:
        """Whether this process writes the run's folder."""
        return self.index == 0

    @property
    def alone(self) -> bool:
        """Whether there is no other."""
        return self.count == 1

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """What this process computes of a batch: every `count`-th, from its index on; perhaps nothing."""
        return items[self.index :: self.count]

    def placed(self, own: Tensor, length: int) -> Tensor:
        """Values of `share`, in the places they have in the whole batch; zeros elsewhere.

        Args:
            own: (n,), one for each of this process's share.
            length: Of the whole batch.
        """
        if self.alone:
            return own
        whole = own.new_zeros(length)
        whole[self.index :: self.count] = own
        return whole

    def summed(self, values: Tensor) -> Tensor:
        """The sum of what all processes hold, of any shape."""
        if not self.alone:
            _asked(lambda: dist.all_reduce(values))
        return values

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace gradients by their sums over all processes, in one exchange; one that is missing counts as zero."""
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
        """Whether it is true for any process."""
        if self.alone:
            return value
        answer = torch.tensor(int(value))
        _asked(lambda: dist.all_reduce(answer, group=self._control))
        return bool(answer)

    def agree(self, value: T) -> T:
        """The main process's value, in all of them; the others wait until it is there."""
        if self.alone:
            return value
        box: list[T] = [value]
        _asked(lambda: dist.broadcast_object_list(box, src=0, group=self._control))
        return box[0]

    def leave(self) -> None:
        """End the exchange, once nothing is asked any more."""
        if not self.alone and dist.is_initialized():
            dist.destroy_process_group()


ALONE = Processes()


def launched() -> int:
    """How many processes a launcher (`accelerate launch`, `torchrun`) has started for this run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def join(device: str) -> Processes:
    """Meet the other processes that a launcher started.

    Args:
        device: The setting `train.device`.

    Raises:
        ConfigError: One device is named for all of them.
    """
    if launched() == 1:
        return ALONE
    if ":" in device:
        raise ConfigError(
            f"train.device = {device!r} names one device for {launched()} processes. Use 'auto', and each has its own."
        )
    state = PartialState(cpu=device == "cpu" or not torch.cuda.is_available(), timeout=_PATIENCE)
    # Apart from the gradients: what waits here leaves a GPU in peace.
    control = dist.new_group(backend="gloo", timeout=_PATIENCE)
    return Processes(state.process_index, state.num_processes, control)


def _asked(exchange: Callable[[], object]) -> None:
    try:
        exchange()
    except RuntimeError as error:
        raise ProcessLostError(
            "Another process of this run has ended. Its own message says why; the same command with --resume goes on "
            "from the last checkpoint, with any number of processes."
        ) from error
