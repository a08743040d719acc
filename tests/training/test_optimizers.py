"""Optimizers against their papers' formulas in float64, or against their libraries called by hand; learning rates."""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import schedulefree
import torch
from helpers.trainer import make_trainer
from lion_pytorch import Lion
from prodigyopt import Prodigy
from torch import Tensor, nn
from transformers.optimization import Adafactor

from sdlora.config.toml import parse_config
from sdlora.errors import ConfigError
from sdlora.events import CheckpointDue, StepDone
from sdlora.lora.inject import AdapterSpec
from sdlora.lora.layers import DoraLayer
from sdlora.training.checkpoint import load_checkpoint, save_checkpoint
from sdlora.training.optimizers import (
    Group,
    MovingAverage,
    adapter_groups,
    evaluation_weights,
    make_optimizer,
    set_learning_rate,
)

RATES = {
    "adamw": 1e-2,
    "prodigy": 1.0,
    "adafactor": 1e-2,
    "lion": 1e-3,
    "schedule_free": 1e-2,
    "muon": 1e-2,
    "torch.optim:NAdam": 1e-2,
}


def steps(make: Callable[[list[nn.Parameter]], torch.optim.Optimizer], *, steady: bool = False) -> list[Tensor]:
    """A parameter of (4, 3) at its start and after each of five steps with fixed gradients, or always the same one."""
    generator = torch.Generator().manual_seed(0)
    parameter = nn.Parameter(torch.randn(4, 3, generator=generator))
    optimizer, seen = make([parameter]), [parameter.detach().clone()]
    for gradient in gradients():
        parameter.grad = torch.ones(4, 3) if steady else gradient
        optimizer.step()
        seen.append(parameter.detach().clone())
    return seen


def gradients() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 3, generator=generator) for _ in range(5)]


def ours(name: str, rate: float, *, steady: bool = False) -> list[Tensor]:
    return steps(
        lambda parameters: make_optimizer(name, [Group(parameters, 1.0)], learning_rate=rate, weight_decay=0.1),
        steady=steady,
    )


def test_adamw_equals_the_formula() -> None:
    found = ours("adamw", 0.01)
    theta, m, v = found[0].double(), torch.zeros(4, 3).double(), torch.zeros(4, 3).double()
    for t, g in enumerate(gradients(), start=1):
        m = 0.9 * m + 0.1 * g.double()
        v = 0.999 * v + 0.001 * g.double() ** 2
        corrected = (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        theta = theta - 0.01 * (corrected + 0.1 * theta)
        torch.testing.assert_close(found[t].double(), theta, rtol=1e-5, atol=1e-6)


def test_lion_equals_the_formula() -> None:
    found = ours("lion", 0.01)
    theta, m = found[0].double(), torch.zeros(4, 3).double()
    for t, g in enumerate(gradients(), start=1):
        theta = theta - 0.01 * ((0.9 * m + 0.1 * g.double()).sign() + 0.1 * theta)
        m = 0.99 * m + 0.01 * g.double()
        torch.testing.assert_close(found[t].double(), theta, rtol=1e-5, atol=1e-6)


def test_other_optimizers_equal_their_libraries() -> None:
    def schedule_free(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        made = schedulefree.AdamWScheduleFree(parameters, lr=0.01, weight_decay=0.1)
        made.train()
        return made

    by_hand: dict[str, Any] = {
        "prodigy": lambda p: Prodigy(p, lr=1.0, weight_decay=0.1, use_bias_correction=True, safeguard_warmup=True),
        "adafactor": lambda p: Adafactor(p, lr=0.01, weight_decay=0.1, scale_parameter=False, relative_step=False),
        "lion": lambda p: Lion(p, lr=0.01, weight_decay=0.1),
        "schedule_free": schedule_free,
    }
    # Prodigy raises its rate only while gradients agree.
    for name, steady in itertools.product(by_hand, (False, True)):
        found = ours(name, 1.0 if name == "prodigy" else 0.01, steady=steady)
        pairs = zip(found, steps(by_hand[name], steady=steady), strict=True)
        assert all(torch.equal(*pair) for pair in pairs), name


def test_arguments_reach_the_optimizer() -> None:
    def made(arguments: dict[str, Any], name: str = "adamw") -> list[Tensor]:
        return steps(
            lambda p: make_optimizer(name, [Group(p, 1.0)], learning_rate=0.01, weight_decay=0.1, arguments=arguments)
        )

    by_hand = steps(lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, betas=(0.5, 0.9), eps=1e-3))
    found = made({"betas": [0.5, 0.9], "eps": 1e-3})
    assert all(torch.equal(*pair) for pair in zip(found, by_hand, strict=True))
    by_hand = steps(lambda p: torch.optim.NAdam(p, lr=0.01, weight_decay=0.1, momentum_decay=0.1))
    found = made({"momentum_decay": 0.1}, "torch.optim:NAdam")
    assert all(torch.equal(*pair) for pair in zip(found, by_hand, strict=True))
    by_hand = steps(lambda p: torch.optim.Muon(p, lr=0.01, weight_decay=0.1))
    assert all(torch.equal(*pair) for pair in zip(made({}, "muon"), by_hand, strict=True))


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("adamw", {"betaz": [0.9, 0.99]}, "does not take 'betaz'. Did you mean 'betas'"),
        ("adamw", {"lr": 1.0}, "set train.learning_rate instead"),
        ("adamw", {"betas": 3}, "cannot be made"),
        ("nowhere.at.all:Nothing", {}, "there is no module 'nowhere'"),
        ("subprocess:Popen", {"shell": True}, "not an optimizer of torch"),
        ("torch.optim:Missing", {}, "not an optimizer of torch"),
    ],
)
def test_what_an_optimizer_does_not_take_is_refused(name: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        make_optimizer(name, [Group([nn.Parameter(torch.ones(2, 2))], 1.0)], learning_rate=0.1, arguments=arguments)


def test_muon_refuses_what_is_no_matrix() -> None:
    with pytest.raises(ConfigError, match="It trains matrices alone"):
        make_optimizer("muon", [Group([nn.Parameter(torch.ones(2, 2, 3, 3))], 1.0)], learning_rate=0.1)


def test_prodigy_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    ours("prodigy", 1.0)
    assert capsys.readouterr().out == ""


def test_every_group_has_its_learning_rate(tiny_base: Path, images: Path, tmp_path: Path) -> None:
    trainer = make_trainer(
        tiny_base, images, tmp_path, targets=("cross_attention", "text_encoder"), spec=AdapterSpec(dora=True)
    )
    adapter = trainer.adapter
    optimizer = make_optimizer("adamw", adapter_groups(adapter, 16.0, 0.5), learning_rate=1e-3)
    set_learning_rate(optimizer, 1e-2)
    before = {parameter: parameter.detach().clone() for parameter in adapter.parameters()}
    for parameter in before:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    # AdamW's first step is the learning rate itself, whatever the gradient's size.
    for path, layer in adapter.layers.items():
        factor = 0.5 if path.startswith("text_encoder.") else 1.0
        assert isinstance(layer, DoraLayer)
        for parameter, rate in ((layer.down, 1e-2), (layer.up, 16e-2), (layer.magnitude, 1e-2)):
            expected = torch.full_like(parameter, -rate * factor)
            torch.testing.assert_close(parameter.detach() - before[parameter], expected, rtol=1e-3, atol=1e-6)


def test_layers_have_the_rate_of_the_last_selector_that_matches(tiny_base: Path, images: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tiny_base, images, tmp_path, targets=("cross_attention", "text_encoder"))
    factors = {"cross_attention": 0.5, "up": 0.25, "0": 3.0, "text_encoder_1": 0.125}
    with pytest.raises(ConfigError, match=r"train\.target_learning_rates: '0' matches none of the"):
        adapter_groups(trainer.adapter, 1.0, 1.0, factors)
    del factors["0"]
    rates = {
        id(p): group.rate_factor
        for group in adapter_groups(trainer.adapter, 4.0, 1.0, factors)
        for p in group.parameters
    }
    for path, layer in trainer.adapter.layers.items():
        rate = 0.125 if path.startswith("text") else 0.25 if path.startswith("up") else 0.5
        assert (rates[id(layer.down)], rates[id(layer.up)]) == (rate, 4 * rate)


@pytest.mark.parametrize("spec", [AdapterSpec(dora=True), AdapterSpec(init="pissa"), AdapterSpec()])
def test_weight_decay_pulls_towards_the_base_model_only(
    tiny_base: Path, images: Path, tmp_path: Path, spec: AdapterSpec
) -> None:
    trainer = make_trainer(tiny_base, images, tmp_path, spec=spec)
    adapter = trainer.adapter
    optimizer = make_optimizer("adamw", adapter_groups(adapter, 1.0, 1.0), learning_rate=0.1, weight_decay=0.5)
    before = {parameter: parameter.detach().clone() for parameter in adapter.parameters()}
    for parameter in before:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for layer in adapter.layers.values():
        shrunk = 1.0 if spec.init == "pissa" else 0.95
        torch.testing.assert_close(layer.down.detach(), shrunk * before[layer.down])
        if isinstance(layer, DoraLayer):
            assert torch.equal(layer.magnitude, before[layer.magnitude])


def test_trainer_applies_the_loraplus_ratio(tiny_base: Path, images: Path, tmp_path: Path) -> None:
    moved = []
    for ratio in (1.0, 8.0):
        trainer = make_trainer(
            tiny_base,
            images,
            tmp_path,
            learning_rate=1e-4,
            loraplus_lr_ratio=ratio,
            weight_decay=0.0,
            log_every_steps=1,
        )
        first = next(event for event in trainer.events() if isinstance(event, StepDone))
        assert first.lr == 1e-4
        moved.append(trainer.adapter.up_parameters()[0].detach().clone())
    torch.testing.assert_close(moved[1], 8 * moved[0], rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize(("name", "ema_decay"), [*((name, 0.0) for name in RATES), ("adamw", 0.9), ("lion", 0.9)])
def test_resumed_training_equals_uninterrupted_training(
    name: str, ema_decay: float, tiny_base: Path, images: Path, tmp_path: Path
) -> None:
    options = {"optimizer": name, "learning_rate": RATES[name], "ema_decay": ema_decay, "warmup_steps": 2}
    whole = make_trainer(tiny_base, images, tmp_path, **options, checkpoint_every_steps=1)
    stopped = make_trainer(tiny_base, images, tmp_path, **options)
    resumed = make_trainer(tiny_base, images, tmp_path, **options)
    for event in whole.events():
        if isinstance(event, CheckpointDue):
            with whole.averaged():
                pass
    saved = None
    for event in stopped.events(lambda: stopped.position.step >= 2):
        if isinstance(event, CheckpointDue):
            saved = save_checkpoint(tmp_path / "c", stopped, {})
    assert saved is not None and stopped.position.step == 2
    load_checkpoint(saved, resumed)
    list(resumed.events())
    assert resumed.position.step == whole.position.step == 5
    for inside in (False, True):
        if inside:
            with whole.averaged(), resumed.averaged():
                compare(whole.step.parameters, resumed.step.parameters)
        else:
            compare(whole.step.parameters, resumed.step.parameters)
    assert whole.step.optimizer.state_dict()["param_groups"] == resumed.step.optimizer.state_dict()["param_groups"]


def compare(left: list[nn.Parameter], right: list[nn.Parameter]) -> None:
    assert any(bool(p.any()) for p in left)
    assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize(
    ("name", "module"), [("prodigy", "prodigyopt"), ("lion", "lion_pytorch"), ("schedule_free", "schedulefree")]
)
def test_missing_package_is_named(name: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=r"pip install 'sdlora\[optimizers\]'"):
        ours(name, 1.0)


def test_8bit_adamw_without_a_gpu_is_refused() -> None:
    with pytest.raises(ConfigError, match="needs a GPU, and this run is on cpu"):
        ours("adamw8bit", 1e-3)


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"optimizer": "schedule_free", "lr_schedule": "cosine"}, "constant"),
        ({"optimizer": "schedule_free", "ema_decay": 0.9}, "train.ema_decay"),
        ({"optimizer": "prodigy"}, "set it to 1"),
        ({"optimizer": "prodigy", "learning_rate": 1, "loraplus_lr_ratio": 4}, "train.loraplus_lr_ratio"),
    ],
)
def test_incompatible_settings_are_refused(train: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config({"data": {"folder": "x"}, "train": train}, name="n")


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
