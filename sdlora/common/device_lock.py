"""One run on a GPU at a time: a second one waits for the first, or is refused.

Used by training and captioning. CPUs are shared: runs on them only slow one another down.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import torch
from platformdirs import user_state_path

from sdlora.common.locks import hold, holder
from sdlora.errors import BusyError
from sdlora.events import Notice

_POLL_SECONDS = 1.0


def device_lock(device: torch.device) -> Path | None:
    """The lock file of a device; None for devices that are shared.

    Args:
        device: A GPU has type "cuda"; its file is named by the hardware's UUID, since CUDA_VISIBLE_DEVICES renumbers.
    """
    if device.type != "cuda":
        return None
    uuid = torch.cuda.get_device_properties(device).uuid
    return user_state_path("sdlora", ensure_exists=True) / f"cuda-{uuid}.lock"


def take_turns(
    path: Path, purpose: str, held: ExitStack, *, wait: bool, should_stop: Callable[[], bool]
) -> Iterator[Notice]:
    """Hold a device until `held` is closed.

    Args:
        path: From `device_lock`.
        purpose: What this run does, for those who wait.
        held: Releases the device.
        wait: Whether to wait for the run that holds it.
        should_stop: Called while waiting; true ends the wait.

    Yields:
        One notice if another run holds the device. When the iteration ends, the device is held, unless `should_stop`
        ended the wait.

    Raises:
        BusyError: Another run holds the device, and `wait` is False.
    """
    other = holder(path)
    if other is not None:
        if not wait:
            raise BusyError(
                f"The GPU is in use by {other}. Omit --no-wait to wait for it, or choose another train.device."
            )
        yield Notice(f"Waiting for the GPU, which is in use by {other}. Press Ctrl-C to stop waiting.")
    while True:
        try:
            held.enter_context(hold(path, purpose))
            return
        except BusyError:
            if not wait:
                raise
        if should_stop():
            return
        time.sleep(_POLL_SECONDS)
