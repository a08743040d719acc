"""The training loop as a whole, on a tiny base model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.trainer import make_trainer

from sdlora.data.batches import Exposure
from sdlora.diffusion.timesteps import NUM_BANDS, Density, cover
from sdlora.errors import DivergedError
from sdlora.events import StepDone
from sdlora.lora.inject import AdapterSpec
from sdlora.training import trainer as trainer_module


def test_means_of_an_epoch_are_over_its_exposures_and_by_band() -> None:
    position = trainer_module.Position()
    assert (position.step, position.take_means()) == (0, (0.0, [None] * NUM_BANDS))
    position.add([0, 999, 1], [1.0, 4.0, 2.0])
    position.add([2], [6.0])
    assert position.take_means() == (3.25, [3.0, *[None] * (NUM_BANDS - 2), 4.0])
    assert position.take_means() == (0.0, [None] * NUM_BANDS), "the next epoch starts at zero"


def test_dropout_acts_in_training_only(tiny_base: Path, images: Path, tmp_path: Path) -> None:
    kept: list[torch.Tensor] = []
    for dropout in (0.0, 0.5, 0.5):
        trainer = make_trainer(tiny_base, images, tmp_path, spec=AdapterSpec(dropout=dropout), learning_rate=1e-2)
        list(trainer.events())
        kept.append(torch.cat([parameter.flatten() for parameter in trainer.step.parameters]))
        with torch.no_grad():
            assert torch.equal(*(trainer.terms[0].loss([Exposure(0, 1)], [300])[0] for _ in range(2)))
            assert all(not layer.dropout_seeds for layer in trainer.adapter.layers.values())
    assert not torch.equal(kept[0], kept[1])
    assert torch.equal(kept[1], kept[2])


def test_timesteps_follow_coverage_and_density(tiny_base: Path, images: Path, tmp_path: Path) -> None:
    options = {"coverage": "image", "density": "cubic_low", "max": 899}
    trainer = make_trainer(tiny_base, images, tmp_path, timesteps=options)
    steps = [event for event in trainer.events() if isinstance(event, StepDone)]
    exposures = [list(zip(step.examples, step.exposures, strict=True)) for step in steps]
    density = Density("cubic_low", maximum=899)
    expected = [[density.timestep(draw) for draw in step] for step in cover("image", exposures, 0)]
    assert [step.timesteps for step in steps] == expected


def test_nan_loss_stops_training(tiny_base: Path, images: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tiny_base, images, tmp_path, log_every_steps=1)
    with torch.no_grad():
        trainer.adapter.up_parameters()[0].fill_(float("nan"))
    with pytest.raises(DivergedError, match="at step 1") as caught:
        list(trainer.events())
    assert caught.value.exit_code == 5


@pytest.mark.parametrize(("seconds", "told_late"), [(0.0, False), (1000.0, True)])
def test_slow_steps_are_told_at_once(
    tiny_base: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, told_late: bool
) -> None:
    monkeypatch.setattr(trainer_module, "READ_AFTER_SECONDS", seconds)
    trainer = make_trainer(tiny_base, images, tmp_path, log_every_steps=100)
    late = [event.step < trainer.position.step for event in trainer.events() if isinstance(event, StepDone)]
    assert any(late) == told_late


def test_training_lowers_the_loss_of_its_images(tiny_base: Path, images: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tiny_base, images, tmp_path, learning_rate=2e-2)
    exposures = [Exposure(index, 1) for index in range(5)]
    with torch.no_grad():
        before = trainer.terms[0].loss(exposures, [500] * 5)[0].mean()
    assert sum(isinstance(event, StepDone) for event in trainer.events()) == 5
    with torch.no_grad():
        assert trainer.terms[0].loss(exposures, [500] * 5)[0].mean() < before
