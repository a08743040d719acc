"""Optimizers by name, each from its own library, and the average of the weights.

Made by the training step; the groups with rates of their own come from the adapter. What is evaluated and exported is
the average, if there is one, swapped in at the end of every epoch.
"""

from __future__ import annotations

import importlib
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
    name: str, groups: Sequence[Group], *, learning_rate: float, weight_decay: float = 0.0
) -> torch.optim.Optimizer:
    """An optimizer in training mode.

    Args:
        name: "adamw", "adamw8bit", "prodigy", "adafactor", "lion" or "schedule_free".
        groups: The parameters it trains, all on one device.
        learning_rate: Above 0; of a group whose factor is 1.
        weight_decay: Decay towards zero of the groups that decay, at least 0.

    Raises:
        ConfigError: The optimizer's package, or the GPU it needs, is missing.

    Source: AdamW 1711.05101, 8-bit AdamW 2110.02861, Prodigy 2306.06101, Adafactor 1804.04235, Lion 2302.06675,
    schedule-free AdamW 2405.15682.
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
    module, kind, arguments = _OPTIMIZERS[name]
    package = module.partition(".")[0]
    try:
        made: torch.optim.Optimizer = getattr(importlib.import_module(module), kind)(options, **arguments)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        extra = "bitsandbytes" if package == "bitsandbytes" else "optimizers"
        raise ConfigError(
            f"train.optimizer = '{name}' needs the package {package.replace('_', '-')}, which is not installed. "
            f"Run: pip install 'sdlora[{extra}]', or choose 'adamw'."
        ) from error
    if name == "schedule_free":
        made.train()  # type: ignore[attr-defined]
    return made


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
