"""Tasks on a Ray cluster: Ray decides where each runs and starts it again where a machine is lost.

Run folders are at a URL, or on a path that all machines share; Ray itself carries tasks and the last messages
alone.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from sdlora.batch.engine import started
from sdlora.batch.location import Location
from sdlora.batch.messages import Message, Task
from sdlora.common.remote import is_url
from sdlora.errors import ConfigError, StoreError

_PATIENCE_SECONDS = 0.5
_ASK_EVERY_SECONDS = 2.0


class RayEngine:
    """A Ray cluster, as one more `sdlora.batch.engine.Engine`.

    Args:
        location: The batch's, at a URL or on a path that all machines share.
        address: Of the cluster; None starts one on this machine, or joins the one that RAY_ADDRESS names.
        num_gpus: Each task's share of a GPU; None gives it one where the cluster has any.

    Raises:
        ConfigError: Ray is not installed.
    """

    def __init__(self, location: Location, address: str | None, num_gpus: float | None) -> None:
        try:
            self._ray = importlib.import_module("ray")
        except ModuleNotFoundError as error:
            raise ConfigError("--engine ray needs Ray. Run: pip install 'sdlora[ray]'.") from error
        self._location, self._address, self._num_gpus = location, address, num_gpus

    def run(self, tasks: Sequence[Task], should_stop: Callable[[], bool]) -> Iterator[Message]:
        """See `sdlora.batch.engine.Engine.run`; messages are the first and the last of each task."""
        ray: Any = self._ray
        stopping = False
        if not ray.is_initialized():
            ray.init(address=self._address, log_to_driver=False)
        self._location.ask_to_stop(False)
        num_gpus = self._num_gpus
        if num_gpus is None:
            num_gpus = 1 if ray.cluster_resources().get("GPU", 0) else 0
        # A task whose machine is lost is started again elsewhere, and goes on from its run folder's last checkpoint.
        remote = ray.remote(num_cpus=1, num_gpus=num_gpus, max_retries=-1)(carry_out_remotely)
        waiting: dict[Any, Task] = {}
        for task in tasks:
            waiting[remote.remote(vars(task), self._location.output, str(Path.cwd()))] = task
            yield started(task)
        try:
            while waiting:
                if should_stop() and not stopping:
                    with contextlib.suppress(StoreError):  # if it does not answer, it is asked again
                        self._location.ask_to_stop(True)
                        stopping = True
                done, _ = ray.wait(list(waiting), num_returns=1, timeout=_PATIENCE_SECONDS)
                for reference in done:
                    yield self._ending(reference, waiting.pop(reference))
        finally:
            for reference in waiting:
                ray.cancel(reference, force=True)
            with contextlib.suppress(StoreError):  # the next batch takes it back as well
                self._location.ask_to_stop(False)

    def _ending(self, reference: Any, task: Task) -> Message:
        try:
            ending: Message = self._ray.get(reference)
            return ending
        except self._ray.exceptions.RayError as error:
            told = f"Ray could not carry it out: {str(error).strip().splitlines()[0]} The same command goes on."
            return {
                "job": task.job, "event": "ended", "status": "cut", "error": told, "exit_code": 1, "epoch": None,
                "seconds": 0.0, "peak_memory_bytes": None,
            }  # fmt: skip


def carry_out_remotely(task: dict[str, Any], output: str, here: str) -> Message:
    """Carry out a task on whatever machine this is, and give its last message.

    Args:
        task: Of `sdlora.batch.messages.Task`, as a dictionary.
        output: The batch's folder or URL, where the wish to stop is told.
        here: The folder that paths in the configuration are seen from; with a URL it need not be on this machine.
    """
    if Path(here).is_dir() or not is_url(output):
        os.chdir(here)
    from sdlora.common.quiet import quiet_libraries

    quiet_libraries()
    from sdlora.batch.task import carry_out
    from sdlora.run.setup import fresh_base

    *_, last = carry_out(Task(**task), fresh_base, _wish_to_stop(Location(output)))
    return last


def _wish_to_stop(location: Location) -> Callable[[], bool]:
    """Whether the batch is to end; asked between steps, which may be shorter than a store's answer takes."""
    asked, wish = -_ASK_EVERY_SECONDS, False

    def is_there() -> bool:
        nonlocal asked, wish
        if not wish and time.monotonic() - asked >= _ASK_EVERY_SECONDS:
            # A store that does not answer stops no training; the run itself tells of it.
            with contextlib.suppress(StoreError):
                wish = location.asked_to_stop()
            asked = time.monotonic()
        return wish

    return is_there
