"""Training processes: started apart from the studio, and recognised by their number and the moment they began.

A number alone would not do: systems give it to another process when its owner is gone.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

_SAME_SECONDS = 1.0


@dataclass(frozen=True)
class Identity:
    """A process for good.

    Attributes:
        pid: Its number.
        began: When it began, in seconds since 1970.
    """

    pid: int
    began: float


def start(arguments: Sequence[str], log: Path, *, said: Path | None = None) -> tuple[subprocess.Popen[bytes], Identity]:
    """Start `sdlora` in a session of its own, so that it outlives the studio; its stderr is added to a log.

    Args:
        arguments: As on the command line, without `sdlora` itself.
        log: Made if it is not there.
        said: The same for its stdout, which goes nowhere if None.

    Returns:
        The child, to be asked for its end (a dead child keeps its number until then), and its identity.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as handle, Path(said or os.devnull).open("ab") as output:
        child = subprocess.Popen(
            [sys.executable, "-m", "sdlora", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=handle,
            start_new_session=True,
        )
    return child, Identity(child.pid, psutil.Process(child.pid).create_time())


def find(identity: Identity) -> psutil.Process | None:
    """The process while it lives; None once it ended, also if its number is another's now."""
    try:
        process = psutil.Process(identity.pid)
        same = abs(process.create_time() - identity.began) < _SAME_SECONDS
        return process if same and process.status() != psutil.STATUS_ZOMBIE else None
    except psutil.NoSuchProcess:
        return None


def find_by_number(pid: int, wrote_at: float) -> psutil.Process | None:
    """The living process that has this number and was there when it wrote its state.

    Args:
        pid: The number that the state names.
        wrote_at: When the process had begun already, in seconds since 1970.
    """
    try:
        process = psutil.Process(pid)
        began = process.create_time()
    except psutil.NoSuchProcess:
        return None
    return find(Identity(pid, began)) if began <= wrote_at + _SAME_SECONDS else None


def is_paused(process: psutil.Process) -> bool:
    """Whether it was halted and waits to be let on."""
    try:
        return bool(process.status() == psutil.STATUS_STOPPED)
    except psutil.NoSuchProcess:
        return False


def halt(process: psutil.Process, *, halted: bool) -> None:
    """Halt a process, or let it go on, and wait a second at most until it shows."""
    if halted:
        process.suspend()
    else:
        process.resume()
    until = time.monotonic() + 1.0
    while is_paused(process) != halted and time.monotonic() < until:
        time.sleep(0.01)


def default_device() -> str:
    """Where training runs when nothing else is asked for: "cuda:0" or "cpu"."""
    import torch

    return "cuda:0" if torch.cuda.is_available() else "cpu"


def device_name(setting: str) -> str:
    """One name for every way to name a device, such as "cuda:0" for "auto" and "cuda" on a machine with a GPU."""
    if setting == "auto":
        return default_device()
    return "cuda:0" if setting == "cuda" else setting
