"""Background tasks: captioning by a model, uploading a run. Each is a separate process, like training.

One task of each kind at a time; its record, stdout and stderr are files in the studio's folder.
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
from .queue import last_lines

Kind = Literal["caption", "publish"]
Stage = Literal["running", "done", "stopped", "failed"]
KINDS: tuple[Kind, ...] = get_args(Kind)
_RUNNING = {"caption": "Captions are already being written", "publish": "A run is already being published"}


@dataclass(frozen=True)
class BackgroundTask:
    """The record of a task."""

    kind: Kind
    subject: str  # the set of images or the run, as the page calls it
    pid: int
    began: float  # start time of its process, in seconds since 1970
    files: tuple[str, ...] = ()  # the files it writes, in order; empty if unknown
    stopping: bool = False  # whether it was asked to stop


@dataclass(frozen=True)
class BackgroundTasks:
    """The background tasks of a studio."""

    studio: Studio

    def find(self, kind: Kind) -> BackgroundTask | None:
        """The last task of a kind, unless it was cleared."""
        file = self._file(kind, ".json")
        if not file.is_file():
            return None
        found = json.loads(file.read_text(encoding="utf-8"))
        return BackgroundTask(**found | {"files": tuple(found["files"])})

    def stage(self, task: BackgroundTask) -> Stage:
        """The stage of a task."""
        if subprocesses.find(task.pid, task.began) is not None:
            return "running"
        # Commands report success on stdout and errors on stderr.
        if self.output(task):
            return "done"
        return "stopped" if task.stopping else "failed"

    def output(self, task: BackgroundTask) -> str:
        """What its command reported on stdout."""
        return last_lines(self._file(task.kind, ".out"))

    def errors(self, task: BackgroundTask) -> str:
        """Why it failed, or its notices, from stderr."""
        lines = last_lines(self._file(task.kind, ".log"))
        return lines[lines.rfind("Error: ") :].removeprefix("Error: ") if "Error: " in lines else lines

    def written(self, task: BackgroundTask) -> int:
        """The number of its files that exist."""
        return sum(Path(file).is_file() and Path(file).stat().st_size > 0 for file in task.files)

    def start(self, kind: Kind, subject: str, arguments: Sequence[str], files: Sequence[Path] = ()) -> None:
        """Start a task with arguments as on the command line, which will write some files.

        Raises:
            StudioError: A task of this kind is running.
        """
        with self.studio.lock():
            before = self.find(kind)
            if before is not None and self.stage(before) == "running":
                raise StudioError(f"{_RUNNING[kind]}, for {before.subject!r}. Wait until it ends, or stop it.")
            self._clear(kind)
            child, began = subprocesses.start(arguments, self._file(kind, ".log"), output=self._file(kind, ".out"))
            task = BackgroundTask(kind, subject, child.pid, began, tuple(map(str, files)))
            write_json(self._file(kind, ".json"), asdict(task))

    def end(self, kind: Kind) -> None:
        """Stop the last task of a kind, or clear it if it has ended."""
        with self.studio.lock():
            task = self.find(kind)
            process = None if task is None else subprocesses.find(task.pid, task.began)
            if task is None or process is None:
                self._clear(kind)
            else:
                write_json(self._file(kind, ".json"), asdict(replace(task, stopping=True)))
                process.terminate()

    def _clear(self, kind: Kind) -> None:
        for ending in (".json", ".out", ".log"):
            self._file(kind, ending).unlink(missing_ok=True)

    def _file(self, kind: Kind, ending: str) -> Path:
        return self.studio.logs / f".{kind}{ending}"
