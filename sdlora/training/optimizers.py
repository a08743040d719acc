"""Optimizers by name, each from its own library, and the average of the weights.

Made by the training step; the groups with rates of their own come from the adapter. What is evaluated and exported is
the average, if there is one, swapped in at the end of every epoch.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sdlora.errors import ConfigError
from sdlora.lora.inject import TEXT_ENCODER, Adapter
from sdlora.lora.layers import DoraLayer

# Module, class and arguments.
_OPTIMIZERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "adamw": ("torch.optim", "AdamW", {}),
    "adamw8bit": ("bitsandbytes.optim", "AdamW8bit", {}),
    # As its authors advise for diffusion models.
    "prodigy": ("prodigyopt", "Prodigy", {"use_bias_correction": True, "safeguard_warmup": True}),
    # Not torch's, which multiplies the rate by the parameter's size: zero for B at the start.
    "adafactor": ("transformers.optimization", "Adafactor", {"scale_parameter": False, "relative_step": False}),
    "lion": ("lion_pytorch", "Lion", {}),
    "muon": ("torch.optim", "Muon", {}),
    "schedule_free": ("schedulefree", "AdamWScheduleFree", {}),
}


@dataclass(frozen=True)
class Group:
    """Parameters that share a learning rate.

    Attributes:
        parameters: At least one.
        rate_factor: Their learning rate over the run's, above 0.
        decays: Whether weight decay acts on them: it pulls towards zero, which must be the base model.
        of_text: Whether they are the text encoders'.
    """

    parameters: Sequence[nn.Parameter]
    rate_factor: float
    decays: bool = True
    of_text: bool = False


def adapter_groups(
    adapter: Adapter,
    loraplus_lr_ratio: float,
    text_encoder_factor: float,
    rate_factors: Mapping[str, float] | None = None,
    *,
    text_apart: bool = False,
) -> list[Group]:
    """An adapter's parameters by learning rate.

    Args:
        adapter: On a UNet, a text encoder, or both.
        loraplus_lr_ratio: The learning rate of every B over that of A, at least 1; DoRA's magnitudes have that of A.
        text_encoder_factor: The learning rate of the text encoder's A over that of the UNet's, above 0.
        rate_factors: The same by selector of layers, where it differs; the last that matches counts.
        text_apart: Give the text encoders groups of their own, whatever their rates.

    Magnitudes, and layers whose start is subtracted, equal the base model at their start and not at zero, so they do
    not decay.

    Raises:
        ConfigError: A selector is of no layer of the adapter.

    Source: LoRA+, Hayou et al. 2402.12354, section 4.
    """
    factors = rate_factors or {}
    blocks, kinds = adapter.blocks, adapter.kinds()
    blocks.refuse_unused("train.target_learning_rates", factors, kinds)
    groups: dict[tuple[float, bool, bool], list[nn.Parameter]] = {}
    for path, layer in adapter.layers.items():
        is_text = path.startswith(TEXT_ENCODER)
        factor = blocks.value(factors, path, kinds[path], text_encoder_factor if is_text else 1.0)
        decays, apart = layer.initial is None, is_text and text_apart
        groups.setdefault((factor, decays, apart), []).append(layer.down)
        groups.setdefault((factor * loraplus_lr_ratio, decays, apart), []).append(layer.up)
        if isinstance(layer, DoraLayer):
            groups.setdefault((factor, False, apart), []).append(layer.magnitude)
    return [Group(parameters, *kind) for kind, parameters in groups.items()]


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of every group of an optimizer made here."""
    for options in optimizer.param_groups:
        options["lr"] = rate * options["rate_factor"]


def make_optimizer(
    name: str,
    groups: Sequence[Group],
    *,
    learning_rate: float,
    weight_decay: float = 0.0,
    arguments: Mapping[str, Any] | None = None,
) -> torch.optim.Optimizer:
    """An optimizer in training mode.

    Args:
        name: "adamw", "adamw8bit", "prodigy", "adafactor", "lion", "muon", "schedule_free", or "module:Class".
        groups: The parameters it trains, all on one device.
        learning_rate: Above 0; of a group whose factor is 1.
        weight_decay: Decay towards zero of the groups that decay, at least 0.
        arguments: Further ones of the optimizer, which take the place of those that it has here.

    Raises:
        ConfigError: The optimizer's package, or the GPU it needs, is missing; or it is no optimizer, or does not take
            an argument.

    Source: AdamW 1711.05101, 8-bit AdamW 2110.02861, Prodigy 2306.06101, Adafactor 1804.04235, Lion 2302.06675,
    schedule-free AdamW 2405.15682, Muon 2502.16982.
    """
    device = groups[0].parameters[0].device
    if name == "adamw8bit" and device.type != "cuda":
        raise ConfigError(
            f"train.optimizer = 'adamw8bit' needs a GPU, and this run is on {device.type}. "
            "Choose 'adamw', the same in 32 bits."
        )
    # The decay is set per group, because Prodigy prints a line if it is an argument.
    options: list[dict[str, Any]] = [
        {
            "params": list(group.parameters),
            "lr": learning_rate * group.rate_factor,
            "weight_decay": weight_decay if group.decays else 0.0,
            "rate_factor": group.rate_factor,
        }
        for group in groups
    ]
    own: dict[str, Any] = {}
    if name in _OPTIMIZERS:
        module, kind, own = _OPTIMIZERS[name]
    else:
        module, _, kind = name.partition(":")
    package = module.partition(".")[0]
    try:
        found = getattr(importlib.import_module(module), kind, None)
    except ModuleNotFoundError as error:
        if name not in _OPTIMIZERS:
            raise ConfigError(
                f"train.optimizer = {name!r}: there is no module {error.name!r}. Install its package, or correct "
                "the name."
            ) from error
        if error.name != package:
            raise
        extra = "bitsandbytes" if package == "bitsandbytes" else "optimizers"
        raise ConfigError(
            f"train.optimizer = '{name}' needs the package {package.replace('_', '-')}, which is not installed. "
            f"Run: pip install 'sdlora[{extra}]', or choose 'adamw'."
        ) from error
    if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)):
        raise ConfigError(f"train.optimizer = {name!r}: {kind!r} of {module!r} is not an optimizer of torch.")
    given = {key: tuple(value) if isinstance(value, list) else value for key, value in (arguments or {}).items()}
    _check_arguments(name, found, given)
    try:
        made = found(options, **{**own, **given})
    except (TypeError, ValueError) as error:
        advice = " It trains matrices alone: no 'conv' in lora.targets, no lora.dora." if name == "muon" else ""
        raise ConfigError(f"train.optimizer = {name!r} cannot be made of this adapter: {error}.{advice}") from error
    if any("train_mode" in group for group in made.param_groups):
        made.train()  # type: ignore[attr-defined]
    return made


def _check_arguments(name: str, kind: type[torch.optim.Optimizer], given: Mapping[str, Any]) -> None:
    """Refuse arguments that an optimizer does not take, or that other options set."""
    elsewhere = {"lr": "train.learning_rate", "weight_decay": "train.weight_decay"}
    if set_twice := [key for key in given if key in elsewhere]:
        raise ConfigError(f"train.optimizer_args.{set_twice[0]}: set {elsewhere[set_twice[0]]} instead.")
    parameters = inspect.signature(kind).parameters
    taken = [key for key in parameters if key not in ("params", *elsewhere)]
    open_ended = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values())
    if not open_ended and (unknown := [key for key in given if key not in taken]):
        near = difflib.get_close_matches(unknown[0], taken, n=1)
        hint = f"Did you mean {near[0]!r}?" if near else f"It takes {', '.join(taken)}."
        raise ConfigError(f"train.optimizer_args: {name!r} does not take {unknown[0]!r}. {hint}")


class MovingAverage:
    """An exponential moving average of parameters, which starts at their values.

    At most a share `decay` in (0, 1) of the old average is kept.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float) -> None:
        self.parameters = parameters
        self.decay = decay
        self.values: list[Tensor] = [parameter.detach().clone() for parameter in parameters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Update after an optimizer step, from 1: average = d * average + (1 - d) * parameter.

        d = min(decay, (1 + step) / (10 + step)), so that the start is soon forgotten.

        Source: Polyak & Juditsky 1992; the warm-up is that of TensorFlow's ExponentialMovingAverage (`num_updates`).
        """
        decay = min(self.decay, (1 + step) / (10 + step))
        for value, parameter in zip(self.values, self.parameters, strict=True):
            value.lerp_(parameter, 1 - decay)


@contextmanager
def evaluation_weights(
    parameters: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer, average: MovingAverage | None
) -> Iterator[None]:
    """Put the weights to evaluate into the parameters for the length of the block.

    Args:
        parameters: Restored exactly at the end.
        optimizer: Switched to evaluation mode and back if it has one, as schedule-free optimizers do.
        average: Its values are used; None leaves them to the optimizer.

    Source: schedule-free optimizers, Defazio et al. 2405.15682: gradients are taken at y, and x is evaluated.
    """
    before = [parameter.detach().clone() for parameter in parameters]
    has_modes = any("train_mode" in options for options in optimizer.param_groups)
    try:
        if has_modes:
            optimizer.eval()  # type: ignore[attr-defined]
        if average is not None:
            _copy(average.values, parameters)
        yield
    finally:
        if has_modes:
            optimizer.train()  # type: ignore[attr-defined]
        # The optimizer's own way back rounds, and a resumed run would differ.
        _copy(before, parameters)


@torch.no_grad()
def _copy(values: Sequence[Tensor], parameters: Sequence[nn.Parameter]) -> None:
    for value, parameter in zip(values, parameters, strict=True):
        parameter.copy_(value)
