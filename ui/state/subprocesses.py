"""Processes of `sdlora` that outlive the studio, identified by pid and start time.

A pid alone would not do: the system reuses it once its process has ended.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

_TOLERANCE_SECONDS = 1.0


def start(arguments: Sequence[str], log: Path, *, output: Path | None = None) -> tuple[subprocess.Popen[bytes], float]:
    """Start `sdlora` in its own session, so that it outlives the studio.

    Args:
        arguments: As on the command line, without `sdlora` itself.
        log: File to which its stderr is appended.
        output: File to which its stdout is appended; None discards it.

    Returns:
        The child, which must be polled (a dead child keeps its pid until then), and its start time in seconds since
        1970.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as handle, Path(output or os.devnull).open("ab") as stdout:
        child = subprocess.Popen(
            [sys.executable, "-m", "sdlora", *arguments],
            stdin=subprocess.DEVNULL, stdout=stdout, stderr=handle, start_new_session=True,
        )  # fmt: skip
    return child, psutil.Process(child.pid).create_time()


def find(pid: int, began: float) -> psutil.Process | None:
    """The process if it is alive; None once it has ended, even if its pid was reused."""
    try:
        process = psutil.Process(pid)
        same = abs(process.create_time() - began) < _TOLERANCE_SECONDS
        return process if same and process.status() != psutil.STATUS_ZOMBIE else None
    except psutil.NoSuchProcess:
        return None


def find_by_pid(pid: int, wrote_at: float) -> psutil.Process | None:
    """The living process with the pid of a state, if it had started when that was written, in seconds since 1970."""
    try:
        began = psutil.Process(pid).create_time()
    except psutil.NoSuchProcess:
        return None
    return find(pid, began) if began <= wrote_at + _TOLERANCE_SECONDS else None


def is_paused(process: psutil.Process) -> bool:
    """Whether the process is suspended."""
    try:
        return bool(process.status() == psutil.STATUS_STOPPED)
    except psutil.NoSuchProcess:
        return False


def set_paused(process: psutil.Process, *, paused: bool) -> None:
    """Suspend or continue a process, and wait up to a second for that to take effect."""
    if paused:
        process.suspend()
    else:
        process.resume()
    until = time.monotonic() + 1.0
    while is_paused(process) != paused and time.monotonic() < until:
        time.sleep(0.01)


def device_name(setting: str) -> str:
    """The canonical name of a device, such as "cuda:0" for "auto" and "cuda" on a machine with a GPU."""
    import torch

    if setting == "auto":
        setting = "cuda" if torch.cuda.is_available() else "cpu"
    return "cuda:0" if setting == "cuda" else setting
