"""The queue: jobs that wait for a device or run on it, and how to start, stop and reorder them.

A job is a configuration and a record in the studio's folder, so that the queue outlives the studio. Changes hold the
studio's lock, so that two clicks, tabs or studios start a job once.
"""

from __future__ import annotations

import json
import signal
import subprocess
import time
from dataclasses import replace

import psutil

from sdlora.common.files import write_json, write_text
from sdlora.config.schema import RunConfig
from sdlora.config.toml import dump_toml, load_config
from sdlora.events import fields_from_json, to_json

from . import subprocesses
from .folders import Studio, StudioError
from .run_status import Job, Status, read_status


class Jobs:
    """All jobs of a studio."""

    def __init__(self, studio: Studio) -> None:
        self.studio = studio
        self._children: list[subprocess.Popen[bytes]] = []

    def find(self, name: str) -> Job | None:
        """The job of a run."""
        file = self.studio.job_record(name)
        if not file.is_file():
            return None
        return Job(**fields_from_json(Job, json.loads(file.read_text(encoding="utf-8"))))

    def all(self) -> list[Job]:
        """All jobs in the order of the queue."""
        found = (self.find(file.stem) for file in self.studio.jobs.glob("*.json") if not file.name.startswith("."))
        return sorted((job for job in found if job is not None), key=lambda job: (job.position, job.name))

    def waiting(self) -> list[Job]:
        """Jobs that were not started yet, the next one first."""
        return [job for job in self.all() if job.stage == "waiting"]

    def status(self, name: str) -> Status:
        """The status of a run."""
        waiting = [job.name for job in self.waiting()]
        return read_status(self.studio, name, self.find(name), waiting.index(name) + 1 if name in waiting else None)

    def names(self) -> list[str]:
        """All runs, started here or from the command line; waiting ones come last, in the order of the queue."""
        waiting = [job.name for job in self.waiting()]
        started = {job.name for job in self.all()} - set(waiting)
        folders = {path.parent.name for path in self.studio.runs.glob("[!.]*/config.toml")}
        return [*sorted((started | folders) - set(waiting)), *waiting]

    # --- What a person can do; each returns a message for the page ---------------------------------------------------

    def add(self, config: RunConfig) -> str:
        """Add a run to the queue; adding the same configuration again has no effect.

        Raises:
            StudioError: Another run has this name.
        """
        name = config.name or ""
        wanted = dump_toml(config)
        with self.studio.lock():
            file, folder = self.studio.job_config(name), self.studio.run(name)
            if self.studio.job_record(name).is_file() and file.read_text(encoding="utf-8") == wanted:
                return f"{name!r} was already started."
            if self.studio.job_record(name).is_file() or (folder.exists() and any(folder.iterdir())):
                raise StudioError(f"There is already a run called {name!r}. Choose another name.")
            write_text(file, wanted)
            self._write(Job(name, subprocesses.device_name(config.train.device), self._last_position() + 1))
        self.dispatch()
        return self._queue_message(name)

    def resume(self, name: str) -> str:
        """Add a run that ended early to the queue again, to resume from its newest checkpoint.

        Raises:
            StudioError: There is no such run, or it is done.
        """
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
            config = load_config(str(source))
            device = subprocesses.device_name(config.train.device)
            self._write(Job(name, device, self._last_position() + 1, resume=started))
        self.dispatch()
        return self._queue_message(name)

    def stop(self, name: str) -> str:
        """Ask a run to save its state and end.

        Raises:
            StudioError: It is not running.
        """
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
        """Pause a run, which keeps its memory and its device.

        Raises:
            StudioError: It is not running.
        """
        subprocesses.set_paused(self._living(name), paused=True)
        return f"{name!r} is paused. It keeps its memory until it is continued or stopped."

    def proceed(self, name: str) -> str:
        """Continue a paused run.

        Raises:
            StudioError: It is not running.
        """
        subprocesses.set_paused(self._living(name), paused=False)
        return f"{name!r} continues."

    def cancel(self, name: str) -> str:
        """Remove a run from the queue.

        Raises:
            StudioError: It is not waiting.
        """
        with self.studio.lock():
            job = self.find(name)
            if job is None or job.stage != "waiting":
                raise StudioError(f"{name!r} is not in the queue any more. See Training whether it has started.")
            self._forget(job)
        return f"{name!r} was removed from the queue."

    def move(self, name: str, by: int) -> str:
        """Move a waiting job towards the front (below 0) or the back of the queue.

        Raises:
            StudioError: It is not waiting.
        """
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
        """Delete the record of a run that is not running.

        Raises:
            StudioError: It is running.
        """
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
                busy.add(subprocesses.device_name(load_config(str(self.studio.run(name) / "config.toml")).train.device))
        return busy

    def _process(self, name: str) -> psutil.Process | None:
        job = self.find(name)
        return (job.process() if job else None) or self.status(name).process

    def _living(self, name: str) -> psutil.Process:
        process = self._process(name)
        if process is None:
            raise StudioError(f"{name!r} is not running.")
        return process

    def _queue_message(self, name: str) -> str:
        waiting = [job.name for job in self.waiting()]
        if name not in waiting:
            return f"{name!r} has started."
        return f"{name!r} is waiting for its device; it is number {waiting.index(name) + 1} in the queue."

    def _write(self, job: Job) -> None:
        write_json(self.studio.job_record(job.name), to_json(job))

    def _forget(self, job: Job) -> None:
        self.studio.job_record(job.name).unlink(missing_ok=True)
        self.studio.job_config(job.name).unlink(missing_ok=True)

    def _last_position(self) -> float:
        return max((job.position for job in self.all()), default=time.time())
