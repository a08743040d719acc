"""Locks between processes: one run in a folder, one run on a GPU.

The operating system releases a lock when its process ends, however it ends, so no lock outlives its run. The holder is
written into the lock file, for messages and for programs that only look.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
from filelock import lock_descriptor, unlock_descriptor

from sdlora.errors import BusyError

_LOCKED_BYTES = 1  # Windows locks the first byte against reading, so the text starts behind it.


@dataclass(frozen=True)
class Holder:
    """The process that holds a lock.

    Attributes:
        pid: Its process ID.
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
    """Hold a lock for the length of the block.

    Args:
        path: The lock file; it stays when the lock is released.
        purpose: What the block does, for those who find the lock held.

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
    """The process that holds a lock, found without touching it; None if it is free or the process was killed.

    Args:
        path: The lock file, which need not exist.
    """
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
