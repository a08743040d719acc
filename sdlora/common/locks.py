"""Who works where: one run in a folder, one run on a GPU.

The operating system holds a lock and lets go of it when its process ends, however that ends, so no lock
outlives its run. Who holds it is written into the file, for people and for programs that only want to look.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from sdlora.errors import BusyError

if sys.platform == "win32":
    import msvcrt

    _LOCKED_BYTE = 1 << 30  # far behind the text, which others may then read
else:
    import fcntl


@dataclass(frozen=True)
class Holder:
    """The process that holds a lock.

    Attributes:
        pid: Its number.
        birth: When it began, by a clock that nobody sets: numbers are given again, but not with the same birth.
        purpose: What it does, in a few words.
    """

    pid: int
    birth: str
    purpose: str

    def __str__(self) -> str:
        return f"process {self.pid} ({self.purpose})"


@contextmanager
def hold(path: Path, purpose: str, wait: Callable[[Holder | None], None] | None = None) -> Iterator[None]:
    """Hold a lock for the length of the block.

    Args:
        path: The lock's file; it stays when the lock is let go.
        purpose: What is done meanwhile, for those who find it held.
        wait: Called with the holder, if it is known, again and again while another process holds it; it sleeps, or
            raises to give up.

    Raises:
        BusyError: Another process holds it, and there is no `wait`.
    """
    with path.open("a+b") as file:
        while not _take(file.fileno()):
            if wait is None:
                raise BusyError(f"{path} is held by {holder(path) or 'another process'}.")
            wait(holder(path))
        try:
            file.truncate(0)
            file.write(json.dumps(asdict(Holder(os.getpid(), _birth(os.getpid()), purpose))).encode("utf-8"))
            file.flush()
            yield
        finally:
            file.truncate(0)
            _release(file.fileno())


def holder(path: Path) -> Holder | None:
    """Who holds a lock, without touching it; None if it is free. A process that was killed holds nothing.

    Args:
        path: The lock's file, which need not be there.
    """
    try:
        found = Holder(**json.loads(path.read_text(encoding="utf-8")))
        return found if _birth(found.pid) == found.birth else None
    except (OSError, ValueError, TypeError, psutil.NoSuchProcess):
        return None


def _birth(pid: int) -> str:
    stat = Path(f"/proc/{pid}/stat")
    if stat.exists():
        # Clock ticks since the machine was started, the 22nd field (man 5 proc); the second one, a name, may hold
        # anything. psutil turns them into a date, which moves when the clock is set.
        return stat.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[19]
    return repr(psutil.Process(pid).create_time())


def _take(file: int) -> bool:
    try:
        if sys.platform == "win32":
            os.lseek(file, _LOCKED_BYTE, os.SEEK_SET)
            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _release(file: int) -> None:
    if sys.platform == "win32":
        os.lseek(file, _LOCKED_BYTE, os.SEEK_SET)
        msvcrt.locking(file, msvcrt.LK_UNLCK, 1)
    else:
        fcntl.flock(file, fcntl.LOCK_UN)
