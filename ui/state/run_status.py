"""How a run stands, as a value: from its files and from whether its process lives.

A process that is gone without a word has failed, whatever its last state says.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Literal

import psutil

from sdlora.common.run_state import RunState, read_state

from . import subprocesses
from .folders import Studio

Word = Literal["none", "waiting", "starting", "running", "paused", "stopping", "stopped", "failed", "done"]
_TAIL_LINES = 12
_TAIL_BYTES = 20_000


@dataclass(frozen=True)
class Status:
    """How a run stands.

    Attributes:
        name: The run's.
        word: In a word; "none" if there is no such run.
        state: How far it is; None before it has written that.
        error: What went wrong, in words; None if nothing did.
        log: The last lines of what its process said.
        position: In the queue, from 1; None if it does not wait.
        process: Its process while it lives.
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
        """Whether its process lives."""
        return self.process is not None

    @property
    def can_resume(self) -> bool:
        """Whether it can be put to work again."""
        return self.word in ("stopped", "failed")


def read_status(
    studio: Studio, name: str, *, position: int | None, process: psutil.Process | None, began: float, stopping: bool
) -> Status:
    """How a run stands.

    Args:
        studio: Where it lies.
        name: Which.
        position: In the queue, from 1; None if it does not wait.
        process: The process that the studio started for it, while that lives.
        began: When that process began; 0 if there was none.
        stopping: Whether it was asked to stop.
    """
    folder = studio.run(name)
    if position is not None:
        return Status(name, "waiting", position=position)
    state = read_state(folder / "state.json")
    if state is not None:
        started = datetime.fromisoformat(state.started).timestamp()
        # A state from before this process is an earlier attempt's. Its times are whole seconds.
        if started < began - 1:
            state = None
        elif process is None and state.status == "running":
            process = subprocesses.find_by_number(state.pid, started + 1)
    if state is None and process is None and not began:
        return Status(name, "none")
    word, error = _word(state, process, stopping)
    return Status(
        name,
        word,
        state,
        error,
        log=last_lines(studio.log(name), folder / "log.txt") if word == "failed" else "",
        process=process,
    )


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
    return "failed", "The training process ended before it began to train."


def last_lines(*files: Path) -> str:
    """The ends of logs, one below the other, as plain text."""
    parts = []
    for file in files:
        if file.is_file():
            with file.open("rb") as handle:
                handle.seek(max(0, file.stat().st_size - _TAIL_BYTES))
                text = handle.read().decode("utf-8", errors="replace")
            # Colours and cursor movements of terminals.
            lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).splitlines()
            parts += [line for line in lines if line.strip()][-_TAIL_LINES:]
    return "\n".join(parts)
