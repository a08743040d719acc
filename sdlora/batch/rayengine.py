"""Tasks on a Ray cluster: Ray decides where each runs and starts it again where a machine is lost.

Floor 7. Run folders are on a path that all machines share; Ray itself carries tasks and the last messages alone.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from sdlora.batch.engine import started
from sdlora.batch.messages import Message, Task
from sdlora.errors import ConfigError

_PATIENCE_SECONDS = 0.5


class RayEngine:
    """A Ray cluster, as one more `sdlora.batch.engine.Engine`.

    Args:
        folder: The batch's, on a path that all machines share.
        address: Of the cluster; None starts one on this machine, or joins the one that RAY_ADDRESS names.
        num_gpus: Each task's share of a GPU; None gives it one where the cluster has any.

    Raises:
        ConfigError: Ray is not installed.
    """

    def __init__(self, folder: Path, address: str | None, num_gpus: float | None) -> None:
        try:
            self._ray = importlib.import_module("ray")
        except ModuleNotFoundError as error:
            raise ConfigError("--engine ray needs Ray. Run: pip install 'sdlora[ray]'.") from error
        self._stop_file, self._address, self._num_gpus = folder.resolve() / "stop", address, num_gpus

    def run(self, tasks: Sequence[Task], should_stop: Callable[[], bool]) -> Iterator[Message]:
        """See `sdlora.batch.engine.Engine.run`; messages are the first and the last of each task."""
        ray: Any = self._ray
        if not ray.is_initialized():
            ray.init(address=self._address, log_to_driver=False)
        self._stop_file.unlink(missing_ok=True)
        num_gpus = self._num_gpus
        if num_gpus is None:
            num_gpus = 1 if ray.cluster_resources().get("GPU", 0) else 0
        # A task whose machine is lost is started again elsewhere, and goes on from its run folder's last checkpoint.
        remote = ray.remote(num_cpus=1, num_gpus=num_gpus, max_retries=-1)(carry_out_remotely)
        waiting: dict[Any, Task] = {}
        for task in tasks:
            waiting[remote.remote(vars(task), str(self._stop_file), str(Path.cwd()))] = task
            yield started(task)
        try:
            while waiting:
                if should_stop() and not self._stop_file.exists():
                    self._stop_file.touch()
                done, _ = ray.wait(list(waiting), num_returns=1, timeout=_PATIENCE_SECONDS)
                for reference in done:
                    yield self._ending(reference, waiting.pop(reference))
        finally:
            for reference in waiting:
                ray.cancel(reference, force=True)
            self._stop_file.unlink(missing_ok=True)

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


def carry_out_remotely(task: dict[str, Any], stop_file: str, here: str) -> Message:
    """Carry out a task on whatever machine this is, and give its last message.

    Args:
        task: Of `sdlora.batch.messages.Task`, as a dictionary.
        stop_file: A file on the shared path; once it is there, the run saves itself and ends.
        here: The folder that paths in the configuration are seen from.
    """
    os.chdir(here)
    from sdlora.quiet import quiet_libraries

    quiet_libraries()
    from sdlora.batch.task import carry_out
    from sdlora.parts import fresh_base

    *_, last = carry_out(Task(**task), fresh_base, Path(stop_file).exists)
    return last
