"""One job in a worker: whatever goes wrong is its last message, and the next job is not touched by it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from sdlora.batch.engine import Task
from sdlora.batch.task import PeakMemory, run_task
from sdlora.config.toml import parse_config
from sdlora.run import setup
from sdlora.run.setup import BasePool, forget_accelerator, fresh_base
from sdlora.training.loss import ExposureLoss


def task(folder: Path, overrides: Sequence[str], *changes: str) -> Task:
    settings = [*overrides, "preview.enabled=false", "train.epochs=1", *changes]
    config = parse_config({"data": {"folder": "x"}}, name="a", overrides=settings)
    return Task("a", config.model_dump(mode="json"), str(folder))


def last(found: Task, bases: Any = fresh_base, stop: bool = False) -> dict[str, Any]:
    *_, message = run_task(found, bases, lambda: stop)
    assert message["event"] == "ended" and message["job"] == "a"
    return message


def test_failures_are_reported_and_keep_the_base(
    tmp_path: Path, overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bases, loads = BasePool(), []
    monkeypatch.setattr(setup, "fresh_base", lambda *arguments: loads.append(1) or fresh_base(*arguments))
    # Left behind by somebody else: a precision that the next run does not have.
    forget_accelerator()
    Accelerator(cpu=True, mixed_precision="bf16")
    done = last(task(tmp_path / "done", overrides), bases)
    assert (done["status"], done["exit_code"], done["epoch"]) == ("done", 0, 1)
    assert (done["seconds"] > 0 and done["peak_memory_bytes"] is None) or done["peak_memory_bytes"] > 2**20
    missing = last(task(tmp_path / "missing", overrides, "data.folder=nowhere"), bases)
    assert (missing["status"], missing["exit_code"]) == ("failed", 3)
    assert not (tmp_path / "missing").exists()
    endless = last(task(tmp_path / "endless", overrides, "train.warmup_steps=9999"), bases)
    assert (endless["exit_code"], len(loads)) == (2, 1)
    stopped = last(task(tmp_path / "stopped", overrides), bases, stop=True)
    assert (stopped["status"], stopped["exit_code"], stopped["error"]) == ("stopped", None, None)
    loads_before = len(loads)

    def diverge(*_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        bad = torch.full((2,), torch.nan, requires_grad=True)
        return bad, bad

    with monkeypatch.context() as patched:
        patched.setattr(ExposureLoss, "__call__", diverge)
        diverged = last(task(tmp_path / "diverged", overrides), bases)
        assert (diverged["status"], diverged["exit_code"]) == ("failed", 5)
        patched.setattr(ExposureLoss, "__call__", None)
        broken = last(task(tmp_path / "broken", overrides), bases)
        assert (broken["status"], broken["exit_code"]) == ("failed", 1)
        assert "TypeError" in broken["error"]
    assert last(task(tmp_path / "stopped", overrides), bases)["status"] == "done", "it went on from its checkpoint"
    assert len(loads) == loads_before, "every one of them took its adapter out again"


def test_leftovers_of_an_interrupted_start_are_removed(tmp_path: Path, overrides: list[str]) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / ".config.toml.sdlora-partial-123").write_text("half")
    assert last(task(folder, overrides))["status"] == "done"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux reports it")
def test_peak_memory_includes_freed_memory_until_the_next_measurement() -> None:
    first = PeakMemory()
    before = first.num_bytes()
    if before is None:
        pytest.skip("this system does not let the peak be reset")
    held = np.ones(200 * 2**20, dtype=np.uint8)
    del held
    high = first.num_bytes()
    assert high is not None and high - before > 150 * 2**20
    later = PeakMemory().num_bytes()
    assert later is not None and later < high - 150 * 2**20
