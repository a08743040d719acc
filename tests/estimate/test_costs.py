"""Disk space: the estimate against the bytes that runs really write."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from helpers.trainer import make_trainer
from PIL import Image
from safetensors.torch import load_file

from sdlora.config.toml import load_config
from sdlora.errors import DiskFullError
from sdlora.estimate import costs
from sdlora.estimate.costs import bytes_in, check_disk_space, run_folder_bytes
from sdlora.lora.inject import AdapterSpec
from sdlora.run.estimate import cache_bytes_of_run, check_disks
from sdlora.run.folder import RunFolder
from sdlora.run.run import start
from sdlora.run.setup import RunContext, prepare
from sdlora.training.prior_preservation import ClassWords
from sdlora.training.train_step import TrainStep

Usage = namedtuple("Usage", "total used free")


def prepared(folder: Path, overrides: list[str]) -> RunContext:
    source = folder / "hero.toml"
    source.write_text("[data]\ntrigger = 'zumi'\n", encoding="utf-8")
    return prepare(load_config(str(source), overrides), RunFolder(folder / "run", "hero"))


def tensor_bytes(cache: Path) -> int:
    """Bytes of all latents and text embeddings in a cache."""
    files = [file for kind in ("moments", "text") for file in (cache / kind).rglob("*.safetensors")]
    return sum(tensor.nbytes for file in files for tensor in load_file(file).values())


@pytest.fixture
def tagged(tmp_path: Path) -> Path:
    """Three images whose four tags can stand in 24 orders."""
    folder = tmp_path / "tagged"
    folder.mkdir()
    for index in range(3):
        Image.new("RGB", (32, 32), (80 * index, 40, 90)).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(f"number {index}, red, small, round", encoding="utf-8")
    return folder


@pytest.mark.parametrize("case", ["plain", "other sets", "shuffled tags", "live text", "trained text"])
def test_cache_estimate_is_what_the_run_writes(
    case: str, tmp_path: Path, overrides: list[str], others: Path, tagged: Path
) -> None:
    changes = {
        "plain": [],
        "other sets": [f"data.validation_folder={others}", f"data.preservation_folder={tagged}",
                       "train.preservation_weight=1"],
        "shuffled tags": [f"data.folder={tagged}", "data.shuffle_tags=true", "data.repeats=4"],
        "live text": [f"data.folder={tagged}", "data.shuffle_tags=true", "cache.max_text_gib=0"],
        "trained text": ['lora.targets=["text_encoder"]'],
    }[case]  # fmt: skip
    parts = prepared(tmp_path, [*overrides, "preview.enabled=false", *changes])
    estimated = cache_bytes_of_run(parts, parts.config)
    parts.adapter.remove()
    list(start(parts.config, tmp_path / "run"))
    assert estimated == tensor_bytes(tmp_path / "cache") > 0
    assert (tmp_path / "cache" / "text").exists() == (case not in ("live text", "trained text"))


@pytest.mark.parametrize("changes", [[], ["train.ema_decay=0.9", "train.optimizer=lion"]])
def test_run_folder_estimate_is_above_what_the_run_writes(
    changes: list[str], tmp_path: Path, overrides: list[str]
) -> None:
    parts = prepared(tmp_path, [*overrides, "lora.target_ranks={ cross_attention = 64 }", *changes])
    assert parts.previews is not None
    estimated = run_folder_bytes(parts.config, parts.adapter, len(parts.previews.wanted()), 32 * 32)
    parts.adapter.remove()
    list(start(parts.config, tmp_path / "run"))
    written = bytes_in(tmp_path / "run")
    assert written < estimated + 2_000_000 and estimated < 20 * written


def test_full_disk_is_reported_before_anything_is_written(
    tmp_path: Path, overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = prepared(tmp_path, overrides)
    check_disks(parts, resume=False)
    parts.adapter.remove()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, 2**20))
    with pytest.raises(DiskFullError, match=r"1\.0 MiB left.*--output or cache\.dir"):
        list(start(parts.config, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_needs_on_one_disk_are_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, 10 * 2**30))
    needs = {"The run": (tmp_path / "not" / "there", 6 * 2**30), "the cache": (tmp_path, 5 * 2**30)}
    for name in needs:
        check_disk_space({name: needs[name]})
    with pytest.raises(DiskFullError, match=r"The run and the cache can take up to 11\.00 GiB.*10\.00 GiB left"):
        check_disk_space(needs)


def test_shuffled_tags_that_are_encoded_live_need_no_disk_space(
    tmp_path: Path, overrides: list[str], tagged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "hero.toml"
    source.write_text("", encoding="utf-8")
    changes = [f"data.folder={tagged}", "data.shuffle_tags=true", "data.repeats=1000", "train.epochs=5",
               "cache.max_text_gib=0", "preview.enabled=false", "train.batch_size=512"]  # fmt: skip
    config = load_config(str(source), [*overrides, *changes])
    # Five thousand captions of each image would take 74 MB in float16.
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, 20_000_000))
    next(start(config, tmp_path / "run"))
    assert (tmp_path / "run" / "config.toml").exists()


def test_cache_estimate_counts_the_repeats_of_each_set(
    tmp_path: Path, overrides: list[str], images: Path, tagged: Path
) -> None:
    def estimated(first: int, second: int) -> int:
        sets = f'data.sets=[{{folder="{images}", repeats={first}}}, {{folder="{tagged}", repeats={second}}}]'
        parts = prepared(tmp_path, [*overrides, "data.folder=", sets, "data.shuffle_tags=true"])
        return cache_bytes_of_run(parts, parts.config)

    # The captions of the first set are one tag each, so that only the second set's tags can be shuffled.
    assert estimated(1, 1) == estimated(4, 1) < estimated(1, 4)


class Clock:
    """Steps that take given seconds, the first of all twice as long."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: float = 8.0) -> None:
        self.now, self.seconds, self.steps = 0.0, seconds, list[int]()
        monkeypatch.setattr(costs.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(TrainStep, "gradients", self.gradients)

    def gradients(self, step: int, micro_batch_size: int) -> None:
        self.now += self.seconds * (1 if self.steps else 2)
        self.steps.append(step)


def test_step_with_the_largest_images_is_timed_without_the_warm_up(
    tiny_base: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(tiny_base, images, tmp_path, batch_size=2)
    clock = Clock(monkeypatch)
    assert costs.step_seconds(trainer, "white") == 8.0
    assert len(clock.steps) == 3 and len(set(clock.steps)) == 1
    assert [len(batch) for batch in trainer.schedule.steps[clock.steps[0] - 1]] == [2], "no batch is larger"


def test_step_that_is_compared_more_often_than_the_average_counts_less(
    tiny_base: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(
        tiny_base, images, tmp_path, batch_size=1, preservation_weight=1.0, preservation_every=2
    )  # fmt: skip
    Clock(monkeypatch)
    words = trainer.terms[0].loss.extra
    assert isinstance(words, ClassWords)
    compared, exposures = len(words.compared), len(trainer.schedule.timesteps)
    assert 0 < compared < exposures
    # The one exposure of the step is compared: 1 + 1.5 times the arithmetic of one that is not.
    assert costs.step_seconds(trainer, "white") == pytest.approx(8.0 / 2.5 * (1 + 1.5 * compared / exposures))


def test_timing_leaves_training_unchanged(tiny_base: Path, images: Path, tmp_path: Path) -> None:
    ends: list[torch.Tensor] = []
    for rehearsed in (False, True):
        trainer = make_trainer(
            tiny_base, images, tmp_path, spec=AdapterSpec(dropout=0.5), learning_rate=1e-2, preservation_weight=1.0
        )
        if rehearsed:
            assert costs.step_seconds(trainer, "white") > 0.0
            assert trainer.position.step == 0 and all(parameter.grad is None for parameter in trainer.step.parameters)
        list(trainer.events())
        ends.append(torch.cat([parameter.flatten() for parameter in trainer.step.parameters]))
    assert torch.equal(*ends)
