"""Tasks on this machine: one worker per device, each with a process of its own.

A worker that ends without a word costs the job it was at and nothing else.
"""

from __future__ import annotations

import contextlib
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
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

from sdlora.batch.messages import Message, Task

_PATIENCE_SECONDS = 0.2


class Engine(Protocol):
    """Carries out tasks somewhere."""

    def run(self, tasks: Sequence[Task], should_stop: Callable[[], bool]) -> Iterator[Message]:
        """Carry out tasks, the first ones first.

        Args:
            tasks: What to do.
            should_stop: Asked every moment; True lets what runs save itself, and nothing new begins.

        Yields:
            "started" for every task, then the messages of `sdlora.batch.task.carry_out`.
        """
        ...


class LocalEngine:
    """Workers on this machine.

    Args:
        logs: The folder for what workers say on stderr.
        environments: One worker each, with these variables on top of this process's.
    """

    def __init__(self, logs: Path, environments: Sequence[Mapping[str, str]]) -> None:
        self._logs = logs
        self._environments = environments

    def run(self, tasks: Sequence[Task], should_stop: Callable[[], bool]) -> Iterator[Message]:
        """See `Engine.run`."""
        waiting, inbox, stopping = deque(tasks), queue.Queue[_Said](), False
        self._logs.mkdir(parents=True, exist_ok=True)
        workers: list[_Worker] = []
        try:
            for number in range(min(len(self._environments), len(tasks))):
                workers.append(self._hire(number, waiting.popleft(), inbox))
                yield started(workers[-1].task)
            while any(worker.employed for worker in workers):
                if should_stop() and not stopping:
                    stopping = True
                    waiting.clear()
                    for worker in workers:
                        worker.dismiss()
                try:
                    number, message = inbox.get(timeout=_PATIENCE_SECONDS)
                except queue.Empty:
                    continue
                worker = workers[number]
                if message is None:
                    if worker.task is not None:
                        yield worker.obituary()
                    worker.employed = False
                    if waiting:
                        workers[number] = self._hire(number, waiting.popleft(), inbox)
                        yield started(workers[number].task)
                    continue
                yield message
                if message["event"] == "ended":
                    worker.task = None
                    if waiting:
                        worker.give(waiting.popleft())
                        yield started(worker.task)
                    else:
                        worker.dismiss()
        finally:
            for worker in workers:
                worker.end()

    def _hire(self, number: int, task: Task, inbox: queue.Queue[_Said]) -> _Worker:
        return _Worker(number, task, self._environments[number], self._logs / f"worker{number}.txt", inbox)


_Said = tuple[int, Message | None]
"""A worker's number and its message; None when its process has ended."""


class _Worker:
    """One process, and what it was told to do."""

    def __init__(
        self, number: int, task: Task, environment: Mapping[str, str], log: Path, inbox: queue.Queue[_Said]
    ) -> None:
        self.employed = True
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
        self.give(task)

    def give(self, task: Task) -> None:
        """Tell it what to do next."""
        self.task, self._since = task, time.monotonic()
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # if it has just died, its listener says so
            print(json.dumps(asdict(task)), file=self._process.stdin, flush=True)

    def dismiss(self) -> None:
        """Let it end: at once if it has nothing to do, else as soon as its job is saved."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()

    def obituary(self) -> Message:
        """The last message of a job whose worker ended without one."""
        assert self.task is not None
        code = self._process.wait()
        if code < 0:
            how = f"was killed by {signal.Signals(-code).name}"
            how += " (is there enough memory?)" if -code == signal.SIGKILL else ""
        else:
            how = f"ended with code {code}"
        error = f"Its worker {how} in the middle of the job; {self._log} may say more. The same command goes on."
        seconds = time.monotonic() - self._since
        return {
            "job": self.task.job, "event": "ended", "status": "cut", "error": error,
            "exit_code": 128 - code if code < 0 else code, "epoch": None, "seconds": seconds, "peak_memory_bytes": None,
        }  # fmt: skip

    def end(self) -> None:
        """Make sure that nothing of it is left."""
        if self._process.poll() is None:
            if self.employed:
                self._process.kill()
            self._process.wait()

    def _listen(self, number: int, inbox: queue.Queue[_Said]) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            try:
                inbox.put((number, json.loads(line)))
            except ValueError:
                break  # cut off in the middle of a line
        inbox.put((number, None))


def started(task: Task | None) -> Message:
    """The first message of a task."""
    assert task is not None
    return {"job": task.job, "event": "started", "folder": task.folder}


def environments() -> list[dict[str, str]]:
    """One worker per GPU, each seeing its own alone; a single one where there is one GPU or none."""
    import torch

    count = torch.cuda.device_count()
    return [{"CUDA_VISIBLE_DEVICES": str(index)} for index in range(count)] if count > 1 else [{}]
