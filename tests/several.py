"""Runs one configuration on several processes, as a launcher would: `python several.py CONFIG OUTPUT COUNT...`.

A program of its own: it forks before torch has computed anything, so that all libraries are loaded once for all.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
from pathlib import Path

from sdlora.configfile import load_config
from sdlora.quiet import quiet_libraries
from sdlora.run import start


def run(config: str, output: Path, index: int, count: int, port: int) -> None:
    os.environ |= {
        "WORLD_SIZE": str(count), "RANK": str(index), "LOCAL_RANK": str(index), "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    resume = (output / "config.toml").exists()
    for _ in start(load_config(config), output, resume=resume):
        pass


def run_on(config: str, output: Path, count: int) -> list[int | None]:
    """The exit codes of all processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=run, args=(config, output, index, count, port)) for index in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


if __name__ == "__main__":
    quiet_libraries()
    for wanted in map(int, sys.argv[3:]):
        codes = run_on(sys.argv[1], Path(sys.argv[2]) / str(wanted), wanted)
        assert codes == [0] * wanted, codes
