"""Studios for tests: their folders, and runs as a trainer leaves them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from sdlora.config.schema import RunConfig
from sdlora.config.toml import parse_config
from sdlora.ui.pages.context import Context
from sdlora.ui.state import subprocesses
from sdlora.ui.state.folders import Studio
from sdlora.ui.state.queue import Jobs
from sdlora.ui.state.try_lora import LoraSampler


@pytest.fixture
def studio(tmp_path: Path) -> Studio:
    made = Studio(tmp_path / "runs")
    made.create()
    return made


@pytest.fixture
def context(studio: Studio) -> Context:
    return Context(studio, Jobs(studio), LoraSampler())


@pytest.fixture
def make_config(studio: Studio, images: Path) -> Callable[..., RunConfig]:
    """Settings that are valid, by name."""

    def made(name: str, **train: Any) -> RunConfig:
        return parse_config({"data": {"folder": str(images)}, "train": train}, name=name)

    return made


@pytest.fixture
def sleepers(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[psutil.Process]]:
    """Stands for training: every job that is started is a process that waits; SIGTERM ends it."""
    started: list[psutil.Process] = []

    def start(arguments: list[str], log: Path, *, output: Path | None = None) -> tuple[subprocess.Popen[bytes], float]:
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(f"started with {' '.join(arguments)}\n", encoding="utf-8")
        child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"], start_new_session=True)
        process = psutil.Process(child.pid)
        started.append(process)
        return child, process.create_time()

    monkeypatch.setattr(subprocesses, "start", start)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    yield started
    for process in started:
        if process.is_running():
            process.kill()
            process.wait(10)
