"""Resuming: what must be as it was is compared, what may differ is told, and a checkpoint reaches all machines."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.runs import CONFIG, metrics, run, without_times
from helpers.trainer import make_trainer
from safetensors.torch import load_file

from sdlora.config.toml import load_config
from sdlora.errors import ConfigError, DataError, OutputError, SdloraError
from sdlora.events import Event, Notice, RunDone, StepDone
from sdlora.run.resume import load_newest
from sdlora.run.run import Stopped, start
from sdlora.training.checkpoint import save_checkpoint
from sdlora.training.distributed import Processes


class Wire(Processes):
    """Keeps what the main process says, for another one to hear it later."""

    def __init__(self, index: int, said: list[Any]) -> None:
        super().__init__(index, 2)
        self._said = said

    def agree(self, value: Any) -> Any:
        if self.is_main:
            self._said.append(value)
            return value
        return self._said.pop(0)

    def any(self, value: bool) -> bool:
        return True


def test_checkpoint_is_sent_to_machines_that_do_not_see_it(tiny_base: Path, images: Path, tmp_path: Path) -> None:
    main, other = (make_trainer(tiny_base, images, tmp_path) for _ in range(2))
    for _ in main.events(lambda: main.position.step == 3):
        pass
    saved = save_checkpoint(tmp_path / "checkpoints", main, {"note": 7})
    said: list[Any] = []
    main.processes, other.processes = Wire(0, said), Wire(1, said)
    assert load_newest([saved], main) == {"note": 7}
    shutil.rmtree(saved)
    assert load_newest([], other) == {"note": 7}
    assert not said and other.position.step == main.position.step == 3
    for here, there in zip(main.adapter.parameters(), other.adapter.parameters(), strict=True):
        assert torch.equal(here, there)
    assert load_newest([], main) is None


@dataclass(frozen=True)
class Cut:
    """A run that was stopped after its first steps, with its own copies of images and base model."""

    folder: Path
    base: Path
    images: Path
    options: list[str]

    def resume(self, *more: str) -> list[Event]:
        return run(self.folder, [*self.options, *more], resume=True)

    @property
    def counters(self) -> Path:
        return max(self.folder.glob("checkpoints/*/complete.json"))


@pytest.fixture(scope="module")
def stopped(tiny_base: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("stopped")
    shutil.copytree(tiny_base, place / "base")
    shutil.copytree(images, place / "set")
    (place / "hero.toml").write_text(CONFIG)
    seen: list[StepDone] = []
    events = start(
        load_config(str(place / "hero.toml"), _options(place)), place / "run", should_stop=lambda: bool(seen)
    )
    with pytest.raises(Stopped):
        for event in events:
            seen += [event] if isinstance(event, StepDone) else []
    run(place / "whole", _options(place))
    return place


def _options(place: Path) -> list[str]:
    return [
        f"base.path={place / 'base'}", f"data.folder={place / 'set'}", f"cache.dir={place / 'cache'}",
        "data.resolution_px=32", "data.bucket_step_px=8", "train.epochs=2", "train.batch_size=2", "lora.rank=2",
        "train.device=cpu", "train.precision=fp32", "preview.enabled=false", "train.log_every_steps=1",
    ]  # fmt: skip


@pytest.fixture
def cut(stopped: Path, tmp_path: Path) -> Cut:
    """The stopped run, with everything that it was made of under another path."""
    shutil.copytree(stopped, tmp_path / "stopped")
    place = tmp_path / "stopped"
    return Cut(place / "run", place / "base", place / "set", _options(place))


def test_run_whose_images_and_base_have_moved_resumes_to_the_same_bytes(cut: Cut) -> None:
    content = json.loads(cut.counters.read_text())
    del content["sha256"]  # as in checkpoints of earlier versions
    content["extra"]["versions"]["torch"] = "1.2.3"
    cut.counters.write_text(json.dumps(content))
    events = cut.resume()
    assert isinstance(events[-1], RunDone)
    (told,) = [event.message for event in events if isinstance(event, Notice) and "started with torch" in event.message]
    assert "torch 1.2.3 (now " in told and "diffusers" not in told
    whole = cut.folder.with_name("whole")
    found, expected = (load_file(folder / "hero.safetensors") for folder in (cut.folder, whole))
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)
    assert without_times(metrics(cut.folder)) == without_times(metrics(whole))
    # So that the studio, which resumes with this file, finds them as well.
    written = load_config(str(cut.folder / "config.toml"))
    assert (written.data.folders, written.base.path) == ([str(cut.images)], str(cut.base))


def test_metrics_that_a_power_cut_took_are_told(cut: Cut) -> None:
    file = cut.folder / "metrics.jsonl"
    file.write_bytes(file.read_bytes()[:-30])
    events = cut.resume()
    assert [event for event in events if isinstance(event, Notice) and "metrics.jsonl has lost" in event.message]
    assert b"\0" not in file.read_bytes()
    assert [row["step"] for row in metrics(cut.folder) if row["event"] == "step"] == [1, 3, 4, 5, 6]


def test_edited_configuration_of_the_run_is_refused(cut: Cut) -> None:
    config = cut.folder / "config.toml"
    config.write_text(re.sub("(?m)^learning_rate = .*", "learning_rate = 0.5", config.read_text()))
    with pytest.raises(ConfigError, match=r"train\.learning_rate: was 0\.0002, now 0\.5"):
        list(start(load_config(str(config)), cut.folder, resume=True))  # as the studio resumes


def test_edited_noise_schedule_of_the_base_is_refused(cut: Cut) -> None:
    config = cut.base / "scheduler" / "scheduler_config.json"
    settings = json.loads(config.read_text())
    config.write_text(json.dumps(settings | {"beta_end": 0.02}))
    with pytest.raises(OutputError, match=f"beta_end of the noise schedule .{settings['beta_end']}, now 0.02"):
        cut.resume()


def test_image_that_was_deleted_is_named_and_the_run_stays_where_it_was(cut: Cut) -> None:
    before = json.loads((cut.folder / "state.json").read_text())
    gone = sorted(cut.images.glob("*.png"))[0]
    content = gone.read_bytes()
    gone.unlink()
    with pytest.raises(DataError, match=f"no longer there: {gone.name}"):
        cut.resume()
    after = json.loads((cut.folder / "state.json").read_text())
    assert after["step"] == before["step"] > 0 and gone.name in after["error"]
    assert after["total_steps"] == before["total_steps"]
    gone.write_bytes(content)
    assert isinstance(cut.resume()[-1], RunDone)


def test_checkpoint_without_what_a_run_needs_is_refused(cut: Cut) -> None:
    content = json.loads(cut.counters.read_text())
    del content["sha256"], content["extra"]["pictures"]
    cut.counters.write_text(json.dumps(content))
    with pytest.raises(SdloraError, match="damaged"):
        cut.resume()
