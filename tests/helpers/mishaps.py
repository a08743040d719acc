"""What can go wrong inside a run, to be put at a `Point`: each takes a call's arguments and its result."""

from __future__ import annotations

import errno
import os
import signal
import time
from pathlib import Path
from typing import Any

import torch

from sdlora.cache import tensors
from sdlora.common.locks import holder


def no_numbers(_: tuple[Any, ...], result: torch.Tensor) -> torch.Tensor:
    """The call answers NaN."""
    return result * float("nan")


def no_latents(_: tuple[Any, ...], result: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Of latents and noise the former are NaN."""
    return result[0] * float("nan"), result[1]


def infinite_gradient(args: tuple[Any, ...], result: Any) -> Any:
    """After `TrainStep.gradients`."""
    args[0].parameters[0].grad.view(-1)[0] = float("inf")
    return result


def infinite_weight(args: tuple[Any, ...], result: Any) -> Any:
    """After `TrainStep.run`."""
    args[0].parameters[0].data.view(-1)[0] = float("inf")
    return result


def broken_optimizer(args: tuple[Any, ...], result: Any) -> Any:
    """After `TrainStep.run`."""
    next(iter(args[0].optimizer.state.values()))["exp_avg"].view(-1)[0] = float("nan")
    return result


def too_large_for_two(args: tuple[Any, ...], result: Any) -> Any:
    """Before `diffusion_loss`: memory for one image at once."""
    if len(args[1].latents) > 1:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    return result


def base_vanishes(args: tuple[Any, ...], result: Any) -> Any:
    """In a method of the training step."""
    folder = Path(args[0].base.path)
    folder.rename(folder.with_name("away"))
    return result


def disk_fills(_: tuple[Any, ...], result: Any) -> Any:
    """All that is left of the disk of $FILLED is taken."""
    with open(os.environ["FILLED"], "wb", buffering=0) as file:  # noqa: PTH123
        try:
            while True:
                file.write(bytes(1 << 12))
        except OSError:
            return result


def clock_jumps() -> None:
    """The clock goes back and forth by a day whenever it is read."""
    real, calls = time.time, [0]

    def jumping() -> float:
        calls[0] += 1
        return real() + 86_400 * (-1) ** calls[0]

    time.time = jumping


def fails_inside(_: tuple[Any, ...], result: Any) -> Any:
    """A bug of ours."""
    raise ZeroDivisionError("oops")


def wait_for_two(_: tuple[Any, ...], result: Any) -> Any:
    """Nobody goes on before two have come to $GATE."""
    gate = Path(os.environ["GATE"])
    (gate / str(os.getpid())).touch()
    while len(list(gate.iterdir())) < 2:
        time.sleep(0.02)
    return result


def gpu_of_a_file() -> None:
    """The device's lock is $DEVICE_LOCK, whatever the device."""
    import sdlora.run.run

    sdlora.run.run.device_lock = lambda _: Path(os.environ["DEVICE_LOCK"])


def kill_holder(_: tuple[Any, ...], result: Any) -> Any:
    """The process that holds $DEVICE_LOCK is killed."""
    other = holder(Path(os.environ["DEVICE_LOCK"]))
    assert other is not None
    os.kill(other.pid, signal.SIGKILL)
    return result


def read_only_cache() -> None:
    """Before a command: no entry can be added to any cache."""

    def no(path: Path) -> Any:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    tensors.atomic_path = no  # type: ignore[assignment]
    tensors.Cache.is_writable = property(lambda self: False)  # type: ignore[assignment, method-assign]
