"""The moving average against its formula, and weights that come back exactly."""

from pathlib import Path

import pytest
import torch
from helpers.trainer import make_trainer
from torch import nn

from sdlora.training.ema import MovingAverage, evaluation_weights


def test_moving_average_equals_the_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    parameter = nn.Parameter(torch.randn(3, 2, generator=generator))
    average = MovingAverage([parameter], 0.6)
    expected = parameter.detach().double()
    for step in range(1, 20):
        with torch.no_grad():
            parameter.copy_(torch.randn(3, 2, generator=generator))
        average.update(step)
        decay = min(0.6, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * parameter.detach().double()
        torch.testing.assert_close(average.values[0].double(), expected, rtol=1e-5, atol=1e-6)


def test_average_is_evaluated_and_training_continues_unchanged(tiny_base: Path, images: Path, tmp_path: Path) -> None:
    plain = make_trainer(tiny_base, images, tmp_path, learning_rate=1e-2)
    trainer = make_trainer(tiny_base, images, tmp_path, learning_rate=1e-2, ema_decay=0.9)
    for each in (plain, trainer):
        list(each.events())
    assert trainer.step.average is not None
    before = [p.detach().clone() for p in trainer.step.parameters]
    with trainer.averaged():
        assert all(torch.equal(p, v) for p, v in zip(trainer.step.parameters, trainer.step.average.values, strict=True))
        assert not torch.equal(trainer.step.parameters[0], before[0])
    assert all(torch.equal(p, b) for p, b in zip(trainer.step.parameters, before, strict=True))
    assert all(torch.equal(p, b) for p, b in zip(plain.step.parameters, before, strict=True))


def test_schedule_free_is_evaluated_at_x_and_trained_at_y(tiny_base: Path, images: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tiny_base, images, tmp_path, learning_rate=1e-2, optimizer="schedule_free")
    list(trainer.events())
    before = [p.detach().clone() for p in trainer.step.parameters]
    with trainer.averaged():
        for parameter, y in zip(trainer.step.parameters, before, strict=True):
            z = trainer.step.optimizer.state[parameter]["z"].double()
            torch.testing.assert_close(parameter.double(), (y.double() - 0.1 * z) / 0.9, rtol=1e-5, atol=1e-7)
    assert all(torch.equal(p, b) for p, b in zip(trainer.step.parameters, before, strict=True))
    assert all(options["train_mode"] for options in trainer.step.optimizer.param_groups)


def test_weights_are_restored_after_an_error() -> None:
    parameter = nn.Parameter(torch.ones(2))
    average = MovingAverage([parameter], 0.5)
    average.values[0].zero_()
    with pytest.raises(KeyError), evaluation_weights([parameter], torch.optim.AdamW([parameter]), average):
        assert parameter.sum() == 0
        raise KeyError
    assert parameter.sum() == 2
