"""Errands: captions written by a model, a run's upload. Each is a process of its own, as training is.

Of each kind there is one at a time: a record, what it said and what it complained of, in the studio's folder.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, get_args

from sdlora.common.files import write_json

from . import subprocesses
from .folders import Studio, StudioError
from .run_status import last_lines
from .subprocesses import Identity

Kind = Literal["caption", "publish"]
Stage = Literal["running", "done", "stopped", "failed"]
KINDS: tuple[Kind, ...] = get_args(Kind)
_WHAT = {"caption": "Captions are being written", "publish": "A run is being published"}


@dataclass(frozen=True)
class BackgroundTask:
    """Something that was asked for.

    Attributes:
        kind: What.
        subject: For which set of images or which run, as the page calls it.
        pid: Its process's number.
        began: When that process began, in seconds since 1970.
        files: What it is to write, one after the other; empty where that is not known.
        stopping: Whether it was asked to stop.
    """

    kind: Kind
    subject: str
    pid: int
    began: float
    files: tuple[str, ...] = ()
    stopping: bool = False


@dataclass(frozen=True)
class BackgroundTasks:
    """The background tasks of a studio.

    Args:
        studio: Its folders exist.
    """

    studio: Studio

    def find(self, kind: Kind) -> BackgroundTask | None:
        """The last background task of a kind, if it was not put away."""
        file = self._file(kind, ".json")
        if not file.is_file():
            return None
        found = json.loads(file.read_text(encoding="utf-8"))
        return BackgroundTask(**found | {"files": tuple(found["files"])})

    def stage(self, task: BackgroundTask) -> Stage:
        """How an background task stands."""
        if subprocesses.find(Identity(task.pid, task.began)) is not None:
            return "running"
        # The commands say what they did on stdout, and why they did not on stderr.
        if self.said(task):
            return "done"
        return "stopped" if task.stopping else "failed"

    def said(self, task: BackgroundTask) -> str:
        """What its command said it had done."""
        return last_lines(self._file(task.kind, ".out"))

    def complaint(self, task: BackgroundTask) -> str:
        """Why it failed, or what it had to tell by the way."""
        told = last_lines(self._file(task.kind, ".log"))
        return told[told.rfind("Error: ") :].removeprefix("Error: ") if "Error: " in told else told

    def written(self, task: BackgroundTask) -> int:
        """How many of its files are there."""
        return sum(Path(file).is_file() and Path(file).stat().st_size > 0 for file in task.files)

    def start(self, kind: Kind, subject: str, arguments: Sequence[str], files: Sequence[Path] = ()) -> None:
        """Start one.

        Args:
            kind: What.
            subject: For which set or run.
            arguments: As on the command line, without `sdlora` itself.
            files: What it is to write.

        Raises:
            StudioError: One of its kind is under way.
        """
        with self.studio.lock():
            before = self.find(kind)
            if before is not None and self.stage(before) == "running":
                raise StudioError(f"{_WHAT[kind]} already, for {before.subject!r}. Wait for the end, or stop that.")
            self._put_away(kind)
            _, identity = subprocesses.start(arguments, self._file(kind, ".log"), said=self._file(kind, ".out"))
            task = BackgroundTask(kind, subject, identity.pid, identity.began, tuple(map(str, files)))
            write_json(self._file(kind, ".json"), asdict(task))

    def end(self, kind: Kind) -> None:
        """Stop the last background task of a kind; one that has ended is put away."""
        with self.studio.lock():
            task = self.find(kind)
            process = None if task is None else subprocesses.find(Identity(task.pid, task.began))
            if task is None or process is None:
                self._put_away(kind)
            else:
                write_json(self._file(kind, ".json"), asdict(replace(task, stopping=True)))
                process.terminate()

    def _put_away(self, kind: Kind) -> None:
        for ending in (".json", ".out", ".log"):
            self._file(kind, ending).unlink(missing_ok=True)

    def _file(self, kind: Kind, ending: str) -> Path:
        return self.studio.logs / f".{kind}{ending}"
