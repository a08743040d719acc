"""Tasks on this machine, one worker process per device, or on a Ray cluster; the protocol between a batch and workers.

A task goes in and messages come out, all of them plain JSON values. A worker that dies loses the job it was running and
nothing else. Imports neither torch nor diffusers, so that a batch with nothing left to do ends at once.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sdlora.batch.location import Location
from sdlora.common.remote import is_url
from sdlora.errors import ConfigError, StoreError

_POLL_SECONDS, _RAY_POLL_SECONDS, _STOP_POLL_SECONDS = 0.2, 0.5, 2.0

Message = dict[str, Any]
"""{"job": name, "event": ...} and the keys of the event; "ended" is the last message of a job."""


@dataclass(frozen=True)
class Task:
    """One job for a worker: its configuration from `RunConfig.model_dump`, and the folder or URL of its run."""

    job: str
    config: dict[str, Any]
    folder: str


Engine = Callable[[Sequence[Task], Callable[[], bool]], Iterator[Message]]
"""Runs tasks in their order; yields "started" for each, then the messages of `sdlora.batch.task.run_task`.

The second argument is polled; True makes running tasks save their state, and no other is started."""


def run_here(
    tasks: Sequence[Task],
    should_stop: Callable[[], bool],
    *,
    logs: Path,
    environments: Sequence[Mapping[str, str]],
) -> Iterator[Message]:
    """An `Engine` of workers on this machine.

    Args:
        logs: Folder for the stderr of workers.
        environments: Environment variables of each worker, on top of this process's.
    """
    waiting, inbox, stopping = deque(tasks), queue.Queue[_Received](), False
    logs.mkdir(parents=True, exist_ok=True)
    workers: list[_Worker] = []

    def worker_of(number: int) -> _Worker:
        return _Worker(number, environments[number], logs / f"worker{number}.txt", inbox)

    try:
        for number in range(min(len(environments), len(tasks))):
            workers.append(worker_of(number))
            yield workers[-1].send(waiting.popleft())
        while any(worker.active for worker in workers):
            if should_stop() and not stopping:
                stopping = True
                waiting.clear()
                for worker in workers:
                    worker.close()
            try:
                number, message = inbox.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                continue
            worker = workers[number]
            if message is None:
                if worker.task is not None:
                    yield worker.lost_message()
                worker.active = False
                if waiting:
                    workers[number] = worker_of(number)
                    yield workers[number].send(waiting.popleft())
                continue
            yield message
            if message["event"] == "ended":
                worker.task = None
                if waiting:
                    yield worker.send(waiting.popleft())
                else:
                    worker.close()
    finally:
        for worker in workers:
            worker.end()


_Received = tuple[int, Message | None]
"""A worker's number and a message of it; None once its process has ended."""


class _Worker:
    """A worker process and its current task."""

    def __init__(self, number: int, environment: Mapping[str, str], log: Path, inbox: queue.Queue[_Received]) -> None:
        self.active = True
        self.task: Task | None = None
        with log.open("ab") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "sdlora.batch.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                encoding="utf-8",
                env={**os.environ, **environment},
            )
        self._log = log
        threading.Thread(target=self._listen, args=(number, inbox), daemon=True).start()

    def send(self, task: Task) -> Message:
        """Send the next task; returns its first message."""
        self.task, self._since = task, time.monotonic()
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # if it has just died, the listener reports it
            print(json.dumps(asdict(task)), file=self._process.stdin, flush=True)
        return started(task)

    def close(self) -> None:
        """Let it end: at once if it is idle, otherwise once the state of its job is saved."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()

    def lost_message(self) -> Message:
        """The last message of a job whose worker died without sending one."""
        assert self.task is not None
        code = self._process.wait()
        if code < 0:
            how = f"was killed by {signal.Signals(-code).name}"
            how += " (possibly out of memory)" if -code == signal.SIGKILL else ""
        else:
            how = f"exited with code {code}"
        error = f"Its worker {how} during the job; see {self._log}. Run the same command again to resume."
        return cut_off(self.task, error, 128 - code if code < 0 else code, time.monotonic() - self._since)

    def end(self) -> None:
        """Kill the process if it still runs."""
        if self._process.poll() is None:
            if self.active:
                self._process.kill()
            self._process.wait()

    def _listen(self, number: int, inbox: queue.Queue[_Received]) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            try:
                inbox.put((number, json.loads(line)))
            except ValueError:
                break  # a torn line
        inbox.put((number, None))


def started(task: Task) -> Message:
    """The first message of a task."""
    return {"job": task.job, "event": "started", "folder": task.folder}


def cut_off(task: Task, error: str, exit_code: int, seconds: float) -> Message:
    """The last message of a task whose process was lost."""
    return {
        "job": task.job, "event": "ended", "status": "cut", "error": error, "exit_code": exit_code, "epoch": None,
        "seconds": seconds, "peak_memory_bytes": None,
    }  # fmt: skip


def environments() -> list[dict[str, str]]:
    """One worker per GPU, which sees only that GPU; a single worker if there are fewer than two GPUs."""
    import torch

    count = torch.cuda.device_count()
    return [{"CUDA_VISIBLE_DEVICES": str(index)} for index in range(count)] if count > 1 else [{}]


class RayEngine:
    """Runs tasks on a Ray cluster; `run` is an `Engine`.

    Args:
        location: Of the batch, at a URL or on a path that all machines share.
        address: Of the cluster; None joins the one that RAY_ADDRESS names, or starts one on this machine.
        num_gpus: GPUs per task, may be a fraction; None means 1 if the cluster has any GPU, else 0.

    Raises:
        ConfigError: Ray is not installed.
    """

    def __init__(self, location: Location, address: str | None, num_gpus: float | None) -> None:
        try:
            self._ray = importlib.import_module("ray")
        except ModuleNotFoundError as error:
            raise ConfigError("--engine ray needs Ray. Install it: pip install 'sdlora[ray]'") from error
        self._location, self._address, self._num_gpus = location, address, num_gpus

    def run(self, tasks: Sequence[Task], should_stop: Callable[[], bool]) -> Iterator[Message]:
        """Run tasks in their order; yields only the first and the last message of each."""
        ray: Any = self._ray
        stopping = False
        if not ray.is_initialized():
            ray.init(address=self._address, log_to_driver=False)
        self._location.request_stop(False)
        num_gpus = self._num_gpus
        if num_gpus is None:
            num_gpus = 1 if ray.cluster_resources().get("GPU", 0) else 0
        # A task whose machine is lost is restarted elsewhere and resumes from the last checkpoint in its run folder.
        remote = ray.remote(num_cpus=1, num_gpus=num_gpus, max_retries=-1)(run_task_remotely)
        waiting: dict[Any, Task] = {}
        for task in tasks:
            waiting[remote.remote(vars(task), self._location.output, str(Path.cwd()))] = task
            yield started(task)
        try:
            while waiting:
                if should_stop() and not stopping:
                    with contextlib.suppress(StoreError):  # the next poll tries again
                        self._location.request_stop(True)
                        stopping = True
                done, _ = ray.wait(list(waiting), num_returns=1, timeout=_RAY_POLL_SECONDS)
                for reference in done:
                    yield self._last_message(reference, waiting.pop(reference))
        finally:
            for reference in waiting:
                ray.cancel(reference, force=True)
            with contextlib.suppress(StoreError):  # the next batch withdraws it, too
                self._location.request_stop(False)

    def _last_message(self, reference: Any, task: Task) -> Message:
        try:
            message: Message = self._ray.get(reference)
            return message
        except self._ray.exceptions.RayError as error:
            reason = str(error).strip().splitlines()[0]
            return cut_off(task, f"Ray could not run the task: {reason} Run the same command again to resume.", 1, 0.0)


def run_task_remotely(task: dict[str, Any], output: str, working_dir: str) -> Message:
    """Run the `Task` of these fields on this machine, and return its last message.

    Args:
        output: Folder or URL of the batch, where stops are requested.
        working_dir: What paths in the configuration are relative to; with a URL it may be missing on this machine.
    """
    if Path(working_dir).is_dir() or not is_url(output):
        os.chdir(working_dir)
    from sdlora.common.process import quiet_libraries

    quiet_libraries()
    from sdlora.batch.task import run_task
    from sdlora.run.setup import fresh_base

    *_, last = run_task(Task(**task), fresh_base, _stop_poll(Location(output)))
    return last


def _stop_poll(location: Location) -> Callable[[], bool]:
    """Whether the batch should stop; rarely asks the store, which may be slower than a training step."""
    polled, stop = -_STOP_POLL_SECONDS, False

    def should_stop() -> bool:
        nonlocal polled, stop
        if not stop and time.monotonic() - polled >= _STOP_POLL_SECONDS:
            # A store that does not answer must not stop training; the run itself reports it.
            with contextlib.suppress(StoreError):
                stop = location.stop_requested()
            polled = time.monotonic()
        return stop

    return should_stop
