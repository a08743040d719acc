"""What TensorBoard and Weights & Biases are told of a run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from accelerate import PartialState
from helpers.runs import run

from sdlora.config.toml import load_config
from sdlora.errors import ConfigError
from sdlora.events import StepDone
from sdlora.run.folder import RunFolder
from sdlora.run.run import Stopped, start
from sdlora.run.trackers import FOLDER, Trackers

SMALL = [
    "name=hero",
    "train.epochs=2",
    "data.repeats=2",
    "preview.num_captions=1",
    "train.checkpoint_every_steps=1",
    "copycheck.enabled=true",
]


def tensorboard(folder: Path) -> dict[str, dict[int, float]]:
    """Every scalar that TensorBoard shows, by name and step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(folder / FOLDER), size_guidance={"images": 0, "scalars": 0})
    reader.Reload()
    found = {name: {e.step: e.value for e in reader.Scalars(name)} for name in reader.Tags()["scalars"]}
    found |= {name: {e.step: float(e.width) for e in reader.Images(name)} for name in reader.Tags()["images"]}
    return found


def metrics(folder: Path, event: str) -> list[dict[str, Any]]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["event"] == event]


class Interrupt:
    """Stops a run after so many of its steps."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def __call__(self) -> bool:
        self.left -= 1
        return self.left < 0


class Online(ModuleType):
    """A stand-in for the wandb package that takes notes."""

    def __init__(self, fails_at: int | None = None) -> None:
        super().__init__("wandb")
        self.__spec__ = __import__("importlib.machinery").machinery.ModuleSpec("wandb", None)
        self.config = self
        self.settings: dict[str, Any] = {}
        self.logged: list[tuple[int, dict[str, Any]]] = []
        self.options: dict[str, Any] = {}
        self.fails_at = fails_at

    def init(self, **options: Any) -> Online:
        self.options = options
        return self

    def update(self, values: dict[str, Any], **_: Any) -> None:
        self.settings |= values

    def log(self, values: dict[str, Any], step: int, **_: Any) -> None:
        if step == self.fails_at:
            raise ConnectionError("no network")
        self.logged.append((step, values))

    def Image(self, pixels: Any, **_: Any) -> tuple[int, ...]:
        return tuple(pixels.shape)

    def finish(self) -> None:
        self.options["finished"] = True


def test_interrupted_run_shows_every_step_once_and_no_captions(
    tmp_path: Path, overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    online = Online()
    monkeypatch.setitem(sys.modules, "wandb", online)
    config = load_config("quickstart", [*overrides, *SMALL, 'train.trackers=["tensorboard", "wandb"]'])
    folder = tmp_path / "run"
    with pytest.raises(Stopped):
        list(start(config, folder, should_stop=Interrupt(3)))
    list(start(config, folder, resume=True))
    shown, steps, epochs = tensorboard(folder), metrics(folder, "step"), metrics(folder, "epoch")
    assert shown["loss/step"] == pytest.approx({line["step"]: line["loss"] for line in steps})
    assert shown["learning_rate"] == pytest.approx({line["step"]: line["lr"] for line in steps})
    assert shown["loss/epoch"] == pytest.approx({line["step"]: line["train_loss"] for line in epochs[1:]})
    assert shown["copies/share"].keys() == {line["step"] for line in epochs}
    names = [file.stem for file in (folder / "epochs/2/previews").iterdir()]
    assert names
    assert all(shown[f"previews/{name}"].keys() == {line["step"] for line in epochs} for name in names)

    assert online.options["name"] == "hero"
    assert online.options["finished"]
    keys = {key for _, values in online.logged for key in values}
    assert {"loss/step", "loss/epoch", "copies/share", f"previews/{names[0]}"} < keys
    assert online.settings["lora.rank"] == config.lora.rank
    sent = json.dumps([online.settings, online.logged, online.options["name"]], default=str)
    assert str(tmp_path) not in sent
    assert "zumi" not in sent


def test_failing_tracker_is_reported_once_and_asked_no_more(
    tmp_path: Path, overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    online = Online(fails_at=2)
    monkeypatch.setitem(sys.modules, "wandb", online)
    folder = RunFolder(tmp_path / "run", "hero")
    folder.path.mkdir()
    folder.config.touch()
    PartialState()  # as in a run
    trackers = Trackers(load_config("quickstart", [*overrides, 'train.trackers=["tensorboard", "wandb"]']), folder)
    told = [trackers.record(StepDone(1, step, 1.0, 1e-3, ["a"], [1], [5], [1.0], 0.1)) for step in (1, 2, 3)]
    assert [notice is None for notice in told] == [True, False, True]
    assert "no network" in str(told[1])
    assert {step for step, _ in online.logged} == {1}
    trackers.finish()
    assert tensorboard(folder.path)["loss/step"].keys() == {1, 2, 3}, "the other tracker goes on"


def test_missing_package_is_refused_before_anything_is_written(
    tmp_path: Path, overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"wandb.*pip install wandb"):
        run(tmp_path / "run", [*overrides, 'train.trackers=["wandb"]'])
    assert not (tmp_path / "run").exists()
