"""Runs one configuration on several processes, as a launcher would.

Called in a process of `helpers.commandline`, which can fork since torch has computed nothing in it.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
from dataclasses import dataclass

from sdlora.common.process import quiet_libraries
from sdlora.common.remote import open_run
from sdlora.config.toml import load_config
from sdlora.run.run import Stopped, start


@dataclass(frozen=True)
class Run:
    """One run, begun or gone on with.

    Attributes:
        count: Of processes.
        output: Folder or URL.
        homes: The folders in which processes keep caches; a single one is shared.
        stop_at: After which step it is to stop.
        resume: Whether it is gone on with, which every process is told.
    """

    count: int
    output: str
    homes: list[str]
    stop_at: int | None = None
    resume: bool = False


def carry_out(config: str, run: Run, index: int, port: int) -> None:
    os.environ |= {
        "WORLD_SIZE": str(run.count), "RANK": str(index), "LOCAL_RANK": str(index), "LOCAL_WORLD_SIZE": str(run.count),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "XDG_CACHE_HOME": run.homes[index % len(run.homes)],
    }  # fmt: skip
    folder, mirrored = open_run(run.output, resume=None)
    steps = [0]
    stopping = lambda: steps[-1] == run.stop_at  # noqa: E731
    try:
        for event in mirrored(start(load_config(config), folder, resume=run.resume, should_stop=stopping)):
            steps.append(getattr(event, "step", steps[-1]))
    except Stopped:
        assert run.stop_at is not None


def run_on(config: str, run: Run) -> list[int | None]:
    """The exit codes of all processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=carry_out, args=(config, run, index, port)) for index in range(run.count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


def run_all(config: str, *runs: Run) -> None:
    """Carry out one run after another, each to its end."""
    quiet_libraries()
    for wanted in runs:
        codes = run_on(config, wanted)
        assert codes == [0] * wanted.count, (wanted, codes)
