"""One run on a GPU at a time: a second one waits for the first, or is refused.

CPUs are shared: runs there slow one another down, and nothing else.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import torch
from platformdirs import user_state_path

from sdlora.common.locks import Holder, hold, holder
from sdlora.errors import BusyError
from sdlora.events import Notice

_LOOK_EVERY_SECONDS = 1.0


def device_lock(device: torch.device) -> Path | None:
    """The file whose lock a run holds while it works on a device; None for devices that are shared.

    Args:
        device: Of type "cuda", a GPU; its file carries the hardware's own number, for CUDA_VISIBLE_DEVICES counts anew.
    """
    if device.type != "cuda":
        return None
    number = torch.cuda.get_device_properties(device).uuid
    return user_state_path("sdlora", ensure_exists=True) / f"cuda-{number}.lock"


def take_turns(
    path: Path, purpose: str, held: ExitStack, *, wait: bool, should_stop: Callable[[], bool]
) -> Iterator[Notice]:
    """Hold a device until `held` is closed.

    Args:
        path: From `device_lock`.
        purpose: What is done on it, for those who wait.
        held: Lets go of it.
        wait: Whether to wait for another run's end.
        should_stop: Asked while waiting.

    Yields:
        One notice, if there is another run to wait for. The device is held when the iteration has ended, unless
        `should_stop` said so.

    Raises:
        BusyError: Another run holds the device, and `wait` is False.
    """
    other = holder(path)
    if other is not None:
        if not wait:
            raise BusyError(
                f"The GPU is in use by {other}. Leave --no-wait out to wait for it, or choose another train.device."
            )
        yield Notice(f"Waiting for the GPU, which is in use by {other}. Ctrl-C gives up.")

    def pause(_: Holder | None) -> None:
        if should_stop():
            raise _GaveUp
        time.sleep(_LOOK_EVERY_SECONDS)

    try:
        held.enter_context(hold(path, purpose, pause if wait else None))
    except _GaveUp:
        return


class _GaveUp(Exception):
    """Nobody waits any longer."""
