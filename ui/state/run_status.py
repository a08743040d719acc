"""Status of a run, from its job in the queue, its files and its process.

Shown by every page; a run whose process has died has failed, whatever its last state says.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Literal

import psutil

from sdlora.common.run_state import RunState, read_state
from sdlora.events import saved_as

from . import subprocesses
from .folders import Studio

Word = Literal["none", "waiting", "starting", "running", "paused", "stopping", "stopped", "failed", "done"]
_MAX_LINES = 12
_MAX_BYTES = 20_000


@dataclass(frozen=True)
class Job:
    """The record of a queued or started run.

    Attributes:
        device: Where it trains, as a `subprocesses.device_name`.
        position: Sorts the queue.
        resume: Whether it resumes from the run's newest checkpoint.
        pid: Of its process, once started.
        began: Start time of that process, in seconds since 1970.
        stopping: Whether it was asked to stop.
    """

    name: str
    device: str
    position: float = field(metadata=saved_as("place"))
    stage: Literal["waiting", "started"] = "waiting"
    resume: bool = False
    pid: int = 0
    began: float = 0.0
    stopping: bool = False

    def process(self) -> psutil.Process | None:
        """Its process, if alive."""
        return subprocesses.find(self.pid, self.began) if self.stage == "started" else None


@dataclass(frozen=True)
class Status:
    """The status of a run.

    Attributes:
        word: The status in a word; "none" if there is no such run.
        state: Its progress; None until its process has written it.
        error: Why it failed; None if it did not.
        log: The last lines of its logs, if it failed.
        position: In the queue, from 1; None if it is not waiting.
        process: Its process, if alive.
    """

    name: str
    word: Word
    state: RunState | None = None
    error: str | None = None
    log: str = ""
    position: int | None = None
    process: psutil.Process | None = field(default=None, compare=False)

    @property
    def alive(self) -> bool:
        """Whether its process is alive."""
        return self.process is not None

    @property
    def can_resume(self) -> bool:
        """Whether it ended early and can be resumed."""
        return self.word in ("stopped", "failed")


def read_status(studio: Studio, name: str, job: Job | None, position: int | None) -> Status:
    """Read the status of a run.

    Args:
        studio: Its studio.
        name: Its name.
        job: Its job; None if it was started from the command line.
        position: In the queue, from 1; None if it is not waiting.
    """
    folder = studio.run(name)
    if position is not None:
        return Status(name, "waiting", position=position)
    process = job.process() if job else None
    began, stopping = (job.began, job.stopping) if job else (0.0, False)
    state = read_state(folder / "state.json")
    if state is not None:
        started = datetime.fromisoformat(state.started).timestamp()
        # A state from before this process belongs to an earlier attempt. Its times are whole seconds.
        if started < began - 1:
            state = None
        elif process is None and state.status == "running":
            process = subprocesses.find_by_pid(state.pid, started + 1)
    if state is None and process is None and not began:
        return Status(name, "none")
    word, error = _word(state, process, stopping)
    log = last_lines(studio.log(name), folder / "log.txt") if word == "failed" else ""
    return Status(name, word, state, error, log, process=process)


def _word(state: RunState | None, process: psutil.Process | None, stopping: bool) -> tuple[Word, str | None]:
    if process is not None:
        if subprocesses.is_paused(process):
            return "paused", None
        if stopping:
            return "stopping", None
        return ("running" if state else "starting"), None
    if state is not None and state.status != "running":
        return state.status, state.error
    if stopping:
        return "stopped", None
    if state is not None:
        return "failed", (
            "The training process died unexpectedly: it was killed, or the machine ran out of memory or was switched "
            "off."
        )
    return "failed", "The training process ended before training started."


def last_lines(*files: Path) -> str:
    """The last lines of logs, concatenated, as plain text."""
    parts = []
    for file in files:
        if file.is_file():
            with file.open("rb") as handle:
                handle.seek(max(0, file.stat().st_size - _MAX_BYTES))
                text = handle.read().decode("utf-8", errors="replace")
            # Colours and cursor movements of terminals.
            lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).splitlines()
            parts += [line for line in lines if line.strip()][-_MAX_LINES:]
    return "\n".join(parts)
