"""Tasks on a Ray cluster: Ray places them on machines and restarts them when a machine is lost.

Run folders are at a URL or on a shared path; Ray itself only transports tasks and their last messages.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from sdlora.batch.engine import Message, Task, cut_off, started
from sdlora.batch.location import Location
from sdlora.common.remote import is_url
from sdlora.errors import ConfigError, StoreError

_POLL_SECONDS = 0.5
_STOP_POLL_SECONDS = 2.0


class RayEngine:
    """Runs tasks on a Ray cluster; `run` is an `sdlora.batch.engine.Engine`.

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
                done, _ = ray.wait(list(waiting), num_returns=1, timeout=_POLL_SECONDS)
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
    from sdlora.common.quiet import quiet_libraries

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
