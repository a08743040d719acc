"""Steps that are timed: which one, how it is corrected, and what it leaves behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.trainer import make_trainer

from sdlora.estimate import timing
from sdlora.lora.inject import AdapterSpec
from sdlora.training.prior_preservation import ClassWords
from sdlora.training.train_step import TrainStep


class Clock:
    """Steps that take given seconds, the first of all twice as long."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: float = 8.0) -> None:
        self.now, self.seconds, self.steps = 0.0, seconds, list[int]()
        monkeypatch.setattr(timing.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(TrainStep, "gradients", self.gradients)

    def gradients(self, step: int, micro_batch_size: int) -> None:
        self.now += self.seconds * (1 if self.steps else 2)
        self.steps.append(step)


def test_step_with_the_largest_images_is_timed_without_the_warm_up(
    tiny_base: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(tiny_base, images, tmp_path, batch_size=2)
    clock = Clock(monkeypatch)
    assert timing.step_seconds(trainer, "white") == 8.0
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
    assert timing.step_seconds(trainer, "white") == pytest.approx(8.0 / 2.5 * (1 + 1.5 * compared / exposures))


def test_timing_leaves_training_unchanged(tiny_base: Path, images: Path, tmp_path: Path) -> None:
    ends: list[torch.Tensor] = []
    for rehearsed in (False, True):
        trainer = make_trainer(
            tiny_base, images, tmp_path, spec=AdapterSpec(dropout=0.5), learning_rate=1e-2, preservation_weight=1.0
        )
        if rehearsed:
            assert timing.step_seconds(trainer, "white") > 0.0
            assert trainer.position.step == 0 and all(parameter.grad is None for parameter in trainer.step.parameters)
        list(trainer.events())
        ends.append(torch.cat([parameter.flatten() for parameter in trainer.step.parameters]))
    assert torch.equal(*ends)
