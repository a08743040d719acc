"""Optimizers by name, each from its own library, and groups of parameters with rates of their own."""

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


@dataclass(frozen=True)
class Group:
    """Parameters that share a learning rate.

    Attributes:
        parameters: At least one.
        rate_factor: Their learning rate over the run's, above 0.
        decays: Whether weight decay acts on them: it pulls towards zero, which must be the base.
    """

    parameters: Sequence[nn.Parameter]
    rate_factor: float
    decays: bool = True


def adapter_groups(adapter: Adapter, plus_ratio: float, text_encoder_factor: float) -> list[Group]:
    """An adapter's parameters by the rate they are trained at.

    Args:
        adapter: On a UNet, a text encoder, or both.
        plus_ratio: The rate of every B over that of A, at least 1; DoRA's magnitudes have the rate of A.
        text_encoder_factor: The rate of the text encoder's A over that of the UNet's, above 0.

    Magnitudes, and layers whose start is subtracted, are at the base where they began and not at zero; they do not
    decay.

    Source: LoRA+, Hayou et al. 2402.12354, section 4.
    """
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for path, layer in adapter.layers.items():
        factor = text_encoder_factor if path.startswith(TEXT_ENCODER) else 1.0
        decays = layer.initial is None
        groups.setdefault((factor, decays), []).append(layer.down)
        groups.setdefault((factor * plus_ratio, decays), []).append(layer.up)
        if isinstance(layer, DoraLayer):
            groups.setdefault((factor, False), []).append(layer.magnitude)
    return [Group(parameters, factor, decays) for (factor, decays), parameters in groups.items()]


def set_rates(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group of an optimizer made here its part of the run's learning rate."""
    for options in optimizer.param_groups:
        options["lr"] = rate * options["rate_factor"]


def make_optimizer(name: str, groups: Sequence[Group], *, rate: float, weight_decay: float) -> torch.optim.Optimizer:
    """An optimizer, ready to train.

    Args:
        name: A value of `train.optimizer`.
        groups: What it trains, all on one device.
        rate: The run's learning rate, above 0.
        weight_decay: Decay towards zero of the groups that decay, at least 0.

    Raises:
        ConfigError: The optimizer's package, or the GPU it needs, is missing.

    Source: AdamW 1711.05101, AdamW in 8 bits 2110.02861, Prodigy 2306.06101, Adafactor 1804.04235, Lion 2302.06675,
    schedule-free AdamW 2405.15682.
    """
    # The decay is an entry of every group, since Prodigy prints a line where it is an argument.
    options: list[dict[str, Any]] = [
        {
            "params": list(group.parameters),
            "lr": rate * group.rate_factor,
            "weight_decay": weight_decay if group.decays else 0.0,
            "rate_factor": group.rate_factor,
        }
        for group in groups
    ]
    made = _construct(name, options, groups[0].parameters[0].device)
    if name == "schedule_free":
        made.train()  # type: ignore[attr-defined]
    return made


def _construct(name: str, options: list[dict[str, Any]], device: torch.device) -> torch.optim.Optimizer:
    made: torch.optim.Optimizer
    if name == "adamw":
        made = torch.optim.AdamW(options)
    elif name == "adamw8bit":
        made = _eight_bits(options, device)
    elif name == "prodigy":
        # What its authors advise for diffusion models.
        made = _library("prodigyopt", name).Prodigy(options, use_bias_correction=True, safeguard_warmup=True)
    elif name == "adafactor":
        # Not torch's: there the rate is multiplied by the parameter's size, which is zero for B at the start.
        adafactor = importlib.import_module("transformers.optimization").Adafactor
        made = adafactor(options, scale_parameter=False, relative_step=False)
    elif name == "lion":
        made = _library("lion_pytorch", name).Lion(options)
    elif name == "schedule_free":
        made = _library("schedulefree", name).AdamWScheduleFree(options)
    else:
        raise AssertionError(f"{name} is not in the schema")
    return made


def _eight_bits(options: list[dict[str, Any]], device: torch.device) -> torch.optim.Optimizer:
    if device.type != "cuda":
        raise ConfigError(
            f"train.optimizer = 'adamw8bit' needs a GPU, and this run is on {device.type}. "
            "Choose 'adamw', which does the same in 32 bits."
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
