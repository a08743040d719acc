"""One LoRA on several processes is the same LoRA; one that dies ends the others, and the run goes on later."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest
import torch
from helpers.commandline import CommandLine
from helpers.several import Run, run_all
from safetensors.torch import load_file
from torch import nn

from sdlora.config.toml import dump_toml, parse_config
from sdlora.errors import ConfigError
from sdlora.training.distributed import ALONE, Processes, join


def config_file(folder: Path, overrides: Sequence[str], *changes: str) -> Path:
    """A file of settings: 5 images x 16 repeats in batches of 4 are 20 steps."""
    settings = ["data.repeats=16", "train.epochs=1", "train.batch_size=4", "preview.enabled=false", *changes]
    config = parse_config({"data": {"folder": "x"}}, name="hero", overrides=[*overrides, *settings])
    file = folder / "hero.toml"
    file.write_text(dump_toml(config), encoding="utf-8")
    return file


def run(command: CommandLine, file: Path, *runs: Run) -> None:
    outcome = command.call(run_all, str(file), *runs)
    assert outcome.code == 0, outcome.err[-3000:]


@pytest.mark.slow
def test_one_two_and_four_processes_train_the_same_adapter(
    command: CommandLine, tmp_path: Path, overrides: list[str], images: Path
) -> None:
    # In buckets of 3 and 2 images no batch is divided evenly: of 4 processes some have nothing to compute.
    own_caches = [setting for setting in overrides if not setting.startswith("cache.dir=")]
    changes = ["train.weight_decay=0.1", "train.log_every_steps=1", f"data.folder=file://{images}"]
    file = config_file(tmp_path, own_caches, *changes)
    url, homes = f"file://{tmp_path}/bucket", [str(tmp_path / name) for name in "abcd"]
    together = [Run(count, str(tmp_path / str(count)), homes[:1]) for count in (1, 2, 4)]
    # Two machines that share nothing but the store, and two others that go on.
    run(command, file, *together, Run(2, url, homes[:2], stop_at=10), Run(2, url, homes[2:], resume=True))
    alone = load_file(tmp_path / "1" / "hero.safetensors")
    losses = step_losses(tmp_path / "1")
    assert len(losses) == 20
    for name in ("2", "4", "bucket"):
        shared = load_file(tmp_path / name / "hero.safetensors")
        assert shared.keys() == alone.keys()
        for key, tensor in alone.items():
            difference = (shared[key] - tensor).norm() / tensor.norm()
            assert difference <= 1e-5, (name, key, float(difference))
        assert step_losses(tmp_path / name) == pytest.approx(losses, rel=1e-5)
    assert any((tensor != 0).any() for name, tensor in alone.items() if "lora_up" in name), "nothing was trained"
    log = (tmp_path / "bucket/log.txt").read_text(encoding="utf-8")
    assert "Resumed at step 10 of 20" in log or "Resumed at step 11 of 20" in log
    stores = [Path(home) / "sdlora/stores" for home in homes]
    assert [(one / "sets").is_dir() for one in stores] == [True] * 4
    assert [(one / "runs").is_dir() for one in stores] == [True, False, True, False], "the main process alone writes"


def test_prior_preservation_on_two_processes_is_the_same(
    command: CommandLine, tmp_path: Path, overrides: list[str]
) -> None:
    # Of two processes that share a batch, one may have all that is kept of it.
    words = ["data.trigger=a", 'data.class_words=["cat"]', "train.preservation_weight=2", "train.preservation_every=3"]
    file = config_file(tmp_path, overrides, *words, "data.repeats=8")
    run(command, file, *(Run(count, str(tmp_path / str(count)), [str(tmp_path / "home")]) for count in (1, 2)))
    alone, shared = (load_file(tmp_path / count / "hero.safetensors") for count in ("1", "2"))
    for name, tensor in alone.items():
        # The optimizer makes more of rounding where gradients are small.
        assert (shared[name] - tensor).norm() <= 1e-3 * tensor.norm(), name
    assert step_losses(tmp_path / "2") == pytest.approx(step_losses(tmp_path / "1"), rel=1e-5)


def step_losses(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [loss for row in rows if row["event"] == "step" for loss in row["losses"][:1]]


@pytest.mark.slow
def test_run_resumes_with_another_number_of_processes_after_one_dies(
    command: CommandLine, tmp_path: Path, overrides: list[str]
) -> None:
    file = config_file(tmp_path, overrides, "train.checkpoint_every_steps=4", "train.log_every_steps=1")
    run(command, file, Run(1, str(tmp_path / "1"), [str(tmp_path)]))
    cut, tried = (
        tmp_path / "cut",
        [sys.executable, "-m", "sdlora", "train", str(file), "--output", str(tmp_path / "cut")],
    )
    # Also without GPUs this starts so many processes.
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launched = subprocess.Popen([*launcher, *tried[1:]], stderr=subprocess.PIPE, text=True)
    killed = False
    while launched.poll() is None and not killed:
        killed = kill_a_follower(launched.pid, cut)
    assert killed, launched.communicate()[1][-3000:]
    launched.communicate(timeout=120)
    assert launched.returncode != 0
    state = json.loads((cut / "state.json").read_text())
    if state["status"] == "failed":  # unless the launcher was quicker
        assert "Another process of this run has ended" in state["error"]
    result = subprocess.run([*tried, "--resume"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "Resumed at step" in (cut / "log.txt").read_text()
    alone, resumed = load_file(tmp_path / "1" / "hero.safetensors"), load_file(cut / "hero.safetensors")
    for name, tensor in alone.items():
        assert (resumed[name] - tensor).norm() / tensor.norm() <= 1e-5, name


def kill_a_follower(launcher: int, folder: Path) -> bool:
    """End the process of a run that does not write its folder, once there is a checkpoint."""
    if not list(folder.glob("checkpoints/*/complete.json")):
        return False
    main = json.loads((folder / "state.json").read_text())["pid"]
    for process in psutil.Process(launcher).children(recursive=True):
        if process.pid != main and "sdlora" in process.cmdline():
            os.kill(process.pid, signal.SIGKILL)
            return True
    return False


def test_single_process_exchanges_nothing() -> None:
    layer = nn.Linear(2, 2)
    ALONE.sum_gradients(layer.parameters())
    assert layer.weight.grad is None
    assert ALONE.share([1, 2, 3]) == [1, 2, 3]
    assert ALONE.any(True) and not ALONE.any(False)
    assert ALONE.agree("x") == "x"


@pytest.mark.parametrize("count", [2, 3, 5])
def test_shares_cover_a_batch_and_keep_its_places(count: int) -> None:
    batch = [10, 11, 12, 13]
    whole = torch.zeros(4)
    for index in range(count):
        one = Processes(index, count)
        whole += one.placed(torch.tensor([float(item) for item in one.share(batch)]), len(batch))
    assert whole.tolist() == batch


def test_one_device_for_several_processes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="for 2 processes"):
        join("cuda:0")
