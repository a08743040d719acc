"""Optimizers by name, each from its own library, and parameter groups with their own learning rates.

Made by the training step; the groups come from the adapter.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import nn

from sdlora.errors import ConfigError
from sdlora.lora.dora import DoraLayer
from sdlora.lora.inject import Adapter
from sdlora.lora.targets import TEXT_ENCODER
from sdlora.training.lr_schedule import LrSchedule


@dataclass(frozen=True)
class OptimizerSettings:
    """Which optimizer, and its learning rates.

    Attributes:
        name: "adamw", "adamw8bit", "prodigy", "adafactor", "lion" or "schedule_free".
        learning_rate: The highest learning rate, above 0.
        lr_schedule: The learning rate after the warm-up.
        warmup_steps: Steps over which it rises from zero.
        loraplus_lr_ratio: The learning rate of B over that of A, at least 1.
        text_encoder_factor: The text encoder's learning rate over the UNet's, above 0.
        weight_decay: Decay towards zero of the groups that decay, at least 0.
        ema_decay: Decay of the moving average of the parameters, in [0, 1); 0 is off.
    """

    name: str
    learning_rate: float
    lr_schedule: LrSchedule = "constant"
    warmup_steps: int = 0
    loraplus_lr_ratio: float = 1.0
    text_encoder_factor: float = 1.0
    weight_decay: float = 0.0
    ema_decay: float = 0.0


@dataclass(frozen=True)
class Group:
    """Parameters that share a learning rate.

    Attributes:
        parameters: At least one.
        rate_factor: Their learning rate over the run's, above 0.
        decays: Whether weight decay acts on them: it pulls towards zero, which must be the base model.
    """

    parameters: Sequence[nn.Parameter]
    rate_factor: float
    decays: bool = True


def adapter_groups(adapter: Adapter, loraplus_lr_ratio: float, text_encoder_factor: float) -> list[Group]:
    """An adapter's parameters by learning rate.

    Args:
        adapter: On a UNet, a text encoder, or both.
        loraplus_lr_ratio: The learning rate of every B over that of A, at least 1; DoRA's magnitudes have that of A.
        text_encoder_factor: The learning rate of the text encoder's A over that of the UNet's, above 0.

    Magnitudes, and layers whose start is subtracted, equal the base model at their start and not at zero, so they do
    not decay.

    Source: LoRA+, Hayou et al. 2402.12354, section 4.
    """
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for path, layer in adapter.layers.items():
        factor = text_encoder_factor if path.startswith(TEXT_ENCODER) else 1.0
        decays = layer.initial is None
        groups.setdefault((factor, decays), []).append(layer.down)
        groups.setdefault((factor * loraplus_lr_ratio, decays), []).append(layer.up)
        if isinstance(layer, DoraLayer):
            groups.setdefault((factor, False), []).append(layer.magnitude)
    return [Group(parameters, factor, decays) for (factor, decays), parameters in groups.items()]


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of every group of an optimizer made here."""
    for options in optimizer.param_groups:
        options["lr"] = rate * options["rate_factor"]


def make_optimizer(settings: OptimizerSettings, groups: Sequence[Group]) -> torch.optim.Optimizer:
    """An optimizer in training mode.

    Args:
        settings: Which optimizer.
        groups: The parameters it trains, all on one device.

    Raises:
        ConfigError: The optimizer's package, or the GPU it needs, is missing.

    Source: AdamW 1711.05101, 8-bit AdamW 2110.02861, Prodigy 2306.06101, Adafactor 1804.04235, Lion 2302.06675,
    schedule-free AdamW 2405.15682.
    """
    # The decay is set per group, because Prodigy prints a line if it is an argument.
    options: list[dict[str, Any]] = [
        {
            "params": list(group.parameters),
            "lr": settings.learning_rate * group.rate_factor,
            "weight_decay": settings.weight_decay if group.decays else 0.0,
            "rate_factor": group.rate_factor,
        }
        for group in groups
    ]
    made = _construct(settings.name, options, groups[0].parameters[0].device)
    if settings.name == "schedule_free":
        made.train()  # type: ignore[attr-defined]
    return made


def _construct(name: str, options: list[dict[str, Any]], device: torch.device) -> torch.optim.Optimizer:
    made: torch.optim.Optimizer
    if name == "adamw":
        made = torch.optim.AdamW(options)
    elif name == "adamw8bit":
        made = _eight_bit_adamw(options, device)
    elif name == "prodigy":
        # As its authors advise for diffusion models.
        made = _library("prodigyopt", name).Prodigy(options, use_bias_correction=True, safeguard_warmup=True)
    elif name == "adafactor":
        # Not torch's, which multiplies the rate by the parameter's size: zero for B at the start.
        adafactor = importlib.import_module("transformers.optimization").Adafactor
        made = adafactor(options, scale_parameter=False, relative_step=False)
    elif name == "lion":
        made = _library("lion_pytorch", name).Lion(options)
    elif name == "schedule_free":
        made = _library("schedulefree", name).AdamWScheduleFree(options)
    else:
        raise AssertionError(f"{name} is not in the schema")
    return made


def _eight_bit_adamw(options: list[dict[str, Any]], device: torch.device) -> torch.optim.Optimizer:
    if device.type != "cuda":
        raise ConfigError(
            f"train.optimizer = 'adamw8bit' needs a GPU, and this run is on {device.type}. "
            "Choose 'adamw', the same in 32 bits."
        )
    made: torch.optim.Optimizer = _library("bitsandbytes", "adamw8bit").optim.AdamW8bit(options)
    return made


def _library(module: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        extra = "bitsandbytes" if module == "bitsandbytes" else "optimizers"
        raise ConfigError(
            f"train.optimizer = '{name}' needs the package {module.replace('_', '-')}, which is not installed. "
            f"Run: pip install 'sdlora[{extra}]', or choose 'adamw'."
        ) from error
