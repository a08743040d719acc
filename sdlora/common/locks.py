"""Locks between processes: one run in a folder, one run on a GPU; a second one waits for the first, or is refused.

The operating system releases a lock when its process ends, however it ends, so no lock outlives its run. The holder is
written into the lock file, for messages and for programs that only look.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
from filelock import lock_descriptor, unlock_descriptor
from platformdirs import user_state_path

from sdlora.errors import BusyError
from sdlora.events import Notice

if TYPE_CHECKING:
    import torch

_POLL_SECONDS = 1.0

_LOCKED_BYTES = 1  # Windows locks the first byte against reading, so the text starts behind it.


@dataclass(frozen=True)
class Holder:
    """The process that holds a lock.

    Attributes:
        birth: When it started, by a clock that nobody sets: process IDs are reused, but not with the same birth.
        purpose: What it does, in a few words.
    """

    pid: int
    birth: str
    purpose: str

    def __str__(self) -> str:
        return f"process {self.pid} ({self.purpose})"


@contextmanager
def hold(path: Path, purpose: str) -> Iterator[None]:
    """Hold a lock for the length of the block; its file stays, and tells those who find it held the purpose.

    Raises:
        BusyError: Another process holds it.
    """
    with path.open("a+b") as file:
        if not lock_descriptor(file.fileno(), blocking=False):
            raise BusyError(f"{path} is held by {holder(path) or 'another process'}.")
        try:
            file.truncate(0)
            content = json.dumps(asdict(Holder(os.getpid(), _birth(os.getpid()), purpose)))
            file.write(b" " * _LOCKED_BYTES + content.encode("utf-8"))
            file.flush()
            yield
        finally:
            file.truncate(0)
            unlock_descriptor(file.fileno())


def holder(path: Path) -> Holder | None:
    """The process that holds a lock, found without touching it; None if it is free or the process was killed."""
    try:
        with path.open("rb") as file:
            file.seek(_LOCKED_BYTES)
            found = Holder(**json.loads(file.read()))
        return found if _birth(found.pid) == found.birth else None
    except (OSError, ValueError, TypeError, psutil.NoSuchProcess):
        return None


def _birth(pid: int) -> str:
    stat = Path(f"/proc/{pid}/stat")
    if stat.exists():
        # Clock ticks since the machine booted, the 22nd field (man 5 proc); the second one, a name, may hold anything.
        # psutil turns them into a date, which moves when the clock is set.
        return stat.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[19]
    return repr(psutil.Process(pid).create_time())


def device_lock(device: torch.device) -> Path | None:
    """The lock file of a GPU, named by its UUID, as CUDA_VISIBLE_DEVICES renumbers; None for a CPU, which is shared."""
    if device.type != "cuda":
        return None
    import torch  # late: programs that only look at locks start without it

    uuid = torch.cuda.get_device_properties(device).uuid
    return user_state_path("sdlora", ensure_exists=True) / f"cuda-{uuid}.lock"


def take_turns(
    path: Path, purpose: str, held: ExitStack, *, wait: bool, should_stop: Callable[[], bool]
) -> Iterator[Notice]:
    """Hold the device of a `device_lock` until `held` is closed, or `wait` for the run that holds it.

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
