"""Targets: the layers of a base model that get an adapter, by the names that users know.

`inject` takes the paths found here. A path is a module's name in the UNet, or in a text encoder behind "text_encoder."
or "text_encoder_2.".
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn

from sdlora.errors import ConfigError
from sdlora.lora.quantize import QuantizedLinear

NETWORKS = ("unet", "text_encoder", "text_encoder_2")
TEXT_ENCODER = "text_encoder"  # prefix of all text encoders' paths, and of none in a UNet
_ATTENTION = r"(to_q|to_k|to_v|to_out\.0)"
TARGETS: dict[str, re.Pattern[str]] = {
    "cross_attention": re.compile(rf".*\.attn2\.{_ATTENTION}"),
    "self_attention": re.compile(rf".*\.attn1\.{_ATTENTION}"),
    "mlp": re.compile(r".*\.ff\.net\.(0\.proj|2)"),
    "projection": re.compile(r".*\.attentions\.\d+\.(proj_in|proj_out)"),
    "conv": re.compile(r".*\.(resnets\.\d+\.(conv1|conv2|conv_shortcut)|(down|up)samplers\.\d+\.conv)"),
    "text_encoder": re.compile(rf"{TEXT_ENCODER}.*\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])"),
}


def target_of(path: str) -> str | None:
    """The name of the target that a module path belongs to, or None."""
    return next((name for name, pattern in TARGETS.items() if pattern.fullmatch(path)), None)


def network_of(path: str) -> str:
    """The network of a module path, one of `NETWORKS`."""
    return next((name for name in NETWORKS[1:] if path.startswith(f"{name}.")), "unet")


def by_prefix(unet: nn.Module, text_encoders: Sequence[nn.Module] = ()) -> dict[str, nn.Module]:
    """Networks by the prefix of their modules' paths, "" for the UNet."""
    return {"": unet} | {f"{name}.": encoder for name, encoder in zip(NETWORKS[1:], text_encoders, strict=False)}


def adaptable(unet: nn.Module, text_encoders: Sequence[nn.Module] = ()) -> list[str]:
    """The paths of all linear and convolution layers, in the networks' order."""
    return [
        prefix + path
        for prefix, network in by_prefix(unet, text_encoders).items()
        for path, module in network.named_modules()
        if isinstance(module, nn.Linear | QuantizedLinear | nn.Conv2d)
    ]


def find_targets(unet: nn.Module, names: Sequence[str], text_encoders: Sequence[nn.Module] = ()) -> list[str]:
    """The paths of all layers of the targets with these names in `TARGETS`, in the networks' order.

    Raises:
        ConfigError: A name matches no layer of this base.
    """
    layers = adaptable(unet, text_encoders)
    found = {name: [path for path in layers if TARGETS[name].fullmatch(path)] for name in names}
    if empty := [name for name, paths in found.items() if not paths]:
        present = [name for name in TARGETS if any(TARGETS[name].fullmatch(path) for path in layers)]
        raise ConfigError(
            f"lora.targets: {', '.join(map(repr, empty))} matches no layer of this base model; "
            f"its targets are: {', '.join(present) or 'none'}."
        )
    wanted = {path for paths in found.values() for path in paths}
    return [path for path in layers if path in wanted]
