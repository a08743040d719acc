"""The queue and the runs in it: jobs that wait for a device or run on it, their status, and what a person can do.

A job is a configuration and a record in the studio's folder, so that the queue outlives the studio. Changes hold the
studio's lock, so that two clicks, tabs or studios start a job once.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import time
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Literal

import psutil

from sdlora.common.files import write_json, write_text
from sdlora.common.run_files import RunState, read_state
from sdlora.config.schema import RunConfig
from sdlora.config.toml import dump_toml, load_config
from sdlora.errors import SdloraError
from sdlora.events import fields_from_json, saved_as, to_json

from . import subprocesses
from .folders import Studio, StudioError, is_run_name, safe_name

Word = Literal[
    "none", "waiting", "starting", "running", "paused", "stopping", "stopped", "failed", "done", "unreadable"
]
MOST_WAITING = 100
_MAX_LINES = 12
_MAX_BYTES = 20_000


@dataclass(frozen=True)
class Job:
    """The record of a queued or started run."""

    name: str
    device: str  # where it trains, as a `subprocesses.device_name`
    position: float = field(metadata=saved_as("place"))  # sorts the queue
    stage: Literal["waiting", "started"] = "waiting"
    resume: bool = False  # whether it resumes from the run's newest checkpoint
    pid: int = 0  # of its process, once started
    began: float = 0.0  # start time of that process, in seconds since 1970
    stopping: bool = False  # whether it was asked to stop

    def process(self) -> psutil.Process | None:
        """Its process, if alive."""
        return subprocesses.find(self.pid, self.began) if self.stage == "started" else None


@dataclass(frozen=True)
class Status:
    """The status of a run."""

    name: str
    word: Word  # the status in a word; "none" if there is no such run, "unreadable" if its folder cannot be read as one
    state: RunState | None = None  # its progress; None until its process has written it
    error: str | None = None  # why it failed or cannot be read; None if neither
    log: str = ""  # the last lines of its logs, if it failed
    position: int | None = None  # in the queue, from 1; None if it is not waiting
    process: psutil.Process | None = field(default=None, compare=False)  # its process, if alive

    @property
    def alive(self) -> bool:
        """Whether its process is alive."""
        return self.process is not None

    @property
    def can_resume(self) -> bool:
        """Whether it ended early and can be resumed."""
        return self.word in ("stopped", "failed")


class Jobs:
    """All jobs of a studio.

    What a person can do returns a message for the page.

    Raises:
        StudioError: There is no such run, or its state does not allow what is asked for.
    """

    def __init__(self, studio: Studio) -> None:
        self.studio = studio
        self._children: list[subprocess.Popen[bytes]] = []

    def find(self, name: str) -> Job | None:
        """The job of a run."""
        return _read_job(self.studio.job_record(name))

    def all(self) -> list[Job]:
        """All jobs in the order of the queue; files that are no jobs are left out."""
        files = (file for file in self.studio.jobs.glob("[!.]*.json") if is_run_name(file.stem))
        found = (_read_job(file) for file in files)
        return sorted((job for job in found if job is not None), key=lambda job: (job.position, job.name))

    def waiting(self) -> list[Job]:
        """Jobs that were not started yet, the next one first."""
        return [job for job in self.all() if job.stage == "waiting"]

    def status(self, name: str) -> Status:
        """The status of a run."""
        waiting = [job.name for job in self.waiting()]
        return read_status(self.studio, name, self.find(name), waiting.index(name) + 1 if name in waiting else None)

    def statuses(self) -> list[Status]:
        """The status of every run in the order of `names`, then of folders that have no valid name of a run."""
        jobs = {job.name: job for job in self.all()}
        positions = {job.name: place for place, job in enumerate(self.waiting(), start=1)}
        known = [read_status(self.studio, name, jobs.get(name), positions.get(name)) for name in self.names()]
        return [*known, *(_misnamed(name) for name in self._folders() if not is_run_name(name))]

    def names(self) -> list[str]:
        """All runs, started here or from the command line; waiting ones come last, in the order of the queue."""
        waiting = [job.name for job in self.waiting()]
        started = {job.name for job in self.all()} - set(waiting)
        folders = set(filter(is_run_name, self._folders()))
        return [*sorted((started | folders) - set(waiting)), *waiting]

    def _folders(self) -> list[str]:
        return sorted(path.parent.name for path in self.studio.runs.glob("[!.]*/config.toml"))

    # --- What a person can do ---------------------------------------------------------------------------------------

    def add(self, config: RunConfig) -> str:
        """Add a run to the queue; adding the same configuration again has no effect."""
        name = config.name or ""
        wanted = dump_toml(config)
        with self.studio.lock():
            file, folder = self.studio.job_config(name), self.studio.run(name)
            if self.studio.job_record(name).is_file() and file.read_text(encoding="utf-8") == wanted:
                return f"{name!r} was already started."
            if self.studio.job_record(name).is_file() or (folder.exists() and any(folder.iterdir())):
                raise StudioError(f"There is already a run called {name!r}. Choose another name.")
            if len(self.waiting()) >= MOST_WAITING:
                raise StudioError(f"{MOST_WAITING} runs wait in the queue already. Remove some under Training first.")
            write_text(file, wanted)
            self._append(name, config)
        return self._dispatch_and_tell(name)

    def resume(self, name: str) -> str:
        """Add a run that ended early to the queue again, to resume from its newest checkpoint."""
        with self.studio.lock():
            status = self.status(name)
            if status.word in ("waiting", "starting", "running", "paused", "stopping"):
                return f"{name!r} is already {status.word}."
            if status.word == "done":
                raise StudioError(f"{name!r} is done, so there is nothing to resume. Clone it to train again.")
            started = (self.studio.run(name) / "config.toml").is_file()
            source = self.studio.run(name) / "config.toml" if started else self.studio.job_config(name)
            if not source.is_file():
                raise StudioError(f"There is no run called {name!r}.")
            self._append(name, load_config(str(source)), resume=started)
        return self._dispatch_and_tell(name)

    def stop(self, name: str) -> str:
        """Ask a run to save its state and end."""
        with self.studio.lock():
            job, process = self.find(name), self._process(name)
            if job is not None and job.stage == "waiting":
                raise StudioError(f"{name!r} is waiting and has nothing to save. Remove it from the queue instead.")
            if process is None:
                raise StudioError(f"{name!r} is not running, so there is nothing to stop.")
            if job is not None and job.stopping:
                return f"{name!r} is already stopping; it ends after the current step."
            if job is not None:
                self._write(replace(job, stopping=True))
            # A paused process would not receive the signal.
            process.resume()
            process.send_signal(signal.SIGTERM)
        return f"Stopping {name!r} after the current step. Its state is saved, so that it can be resumed."

    def pause(self, name: str) -> str:
        """Pause a run, which keeps its memory and its device."""
        subprocesses.set_paused(self._living(name), paused=True)
        return f"{name!r} is paused. It keeps its memory until it is continued or stopped."

    def proceed(self, name: str) -> str:
        """Continue a paused run."""
        subprocesses.set_paused(self._living(name), paused=False)
        return f"{name!r} continues."

    def cancel(self, name: str) -> str:
        """Remove a run from the queue."""
        with self.studio.lock():
            job = self.find(name)
            if job is None or job.stage != "waiting":
                raise StudioError(
                    f"{name!r} is not in the queue any more. It may have started: look at the Training page."
                )
            self._forget(job)
        return f"{name!r} was removed from the queue."

    def move(self, name: str, by: int) -> str:
        """Move a waiting job towards the front (below 0) or the back of the queue."""
        with self.studio.lock():
            queue = self.waiting()
            order = [job.name for job in queue]
            if name not in order:
                raise StudioError(f"{name!r} is not in the queue any more.")
            positions = [job.position for job in queue]
            index = order.index(name)
            queue.insert(max(0, index + by), queue.pop(index))
            for position, job in zip(positions, queue, strict=True):
                self._write(replace(job, position=position))
        return f"The queue is now: {', '.join(job.name for job in queue)}."

    def forget(self, name: str) -> None:
        """Delete the record of a run that is not running."""
        with self.studio.lock():
            if self._process(name) is not None:
                raise StudioError(f"{name!r} is running. Stop it first.")
            if (job := self.find(name)) is not None:
                self._forget(job)
            self.studio.log(name).unlink(missing_ok=True)

    # --- What the studio does by itself -----------------------------------------------------------------------------

    def dispatch(self) -> None:
        """Start the next job on every free device."""
        with self.studio.lock():
            self._children = [child for child in self._children if child.poll() is None]
            queue = self.waiting()
            busy = self._busy_devices() if queue else set()
            for job in queue:
                if job.device not in busy:
                    self._start(job)
                    busy.add(job.device)

    def _start(self, job: Job) -> None:
        folder = self.studio.run(job.name)
        config = folder / "config.toml" if job.resume else self.studio.job_config(job.name)
        arguments = ["train", str(config), "--output", str(folder), "--json", *(["--resume"] if job.resume else [])]
        child, began = subprocesses.start(arguments, self.studio.log(job.name))
        self._children.append(child)
        self._write(replace(job, stage="started", pid=child.pid, began=began, stopping=False))

    def _busy_devices(self) -> set[str]:
        busy = {job.device for job in self.all() if job.process() is not None}
        for name in self.names():
            # Runs started from the command line have no job.
            if self.find(name) is None and self.status(name).alive:
                busy.add(subprocesses.device_name(_device(self.studio.run(name))))
        return busy

    def _process(self, name: str) -> psutil.Process | None:
        job = self.find(name)
        return (job.process() if job else None) or self.status(name).process

    def _living(self, name: str) -> psutil.Process:
        process = self._process(name)
        if process is None:
            raise StudioError(f"{name!r} is not running.")
        return process

    def _dispatch_and_tell(self, name: str) -> str:
        self.dispatch()
        waiting = [job.name for job in self.waiting()]
        if name not in waiting:
            return f"{name!r} has started."
        return f"{name!r} is waiting for its device; it is number {waiting.index(name) + 1} in the queue."

    def _append(self, name: str, config: RunConfig, *, resume: bool = False) -> None:
        position = max((job.position for job in self.all()), default=time.time()) + 1
        self._write(Job(name, subprocesses.device_name(config.train.device), position, resume=resume))

    def _write(self, job: Job) -> None:
        write_json(self.studio.job_record(job.name), to_json(job))

    def _forget(self, job: Job) -> None:
        self.studio.job_record(job.name).unlink(missing_ok=True)
        self.studio.job_config(job.name).unlink(missing_ok=True)


# --- The status of a run; one whose process has died has failed, whatever its last state says -------------------------


def read_status(studio: Studio, name: str, job: Job | None, position: int | None) -> Status:
    """The status of a run, which has no job if it was started from the command line."""
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
        if (folder / "state.json").is_file():
            return Status(
                name, "unreadable", error="Its state.json is empty, damaged, or of a later version of sdlora."
            )
        return Status(name, "none")
    word, error = _word(state, process, stopping)
    log = last_lines(studio.log(name), folder / "log.txt") if word == "failed" else ""
    return Status(name, word, state, error, log, process=process)


def _misnamed(name: str) -> Status:
    return Status(
        name, "unreadable",
        error=f"Its folder has a name that no run can have. Rename it, for example to {safe_name(name, 'run')!r}.",
    )  # fmt: skip


def _read_job(file: Path) -> Job | None:
    """The job in a file; None if there is no file, or it is not the record of a job."""
    try:
        return Job(**fields_from_json(Job, json.loads(file.read_text(encoding="utf-8"))))
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def _device(folder: Path) -> str:
    """The device that a run trains on; the usual one if its settings cannot be read."""
    try:
        return load_config(str(folder / "config.toml")).train.device
    except SdloraError:
        return "auto"


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
