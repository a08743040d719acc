"""Which modules of a base an adapter may sit on, by the names that users know.

Floor 2. A path is a module's name in the UNet, or in the text encoder with `TEXT_ENCODER` in front.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn

from sdlora.errors import ConfigError

TEXT_ENCODER = "text_encoder."
_ATTENTION = r"(to_q|to_k|to_v|to_out\.0)"
TARGETS: dict[str, re.Pattern[str]] = {
    "cross_attention": re.compile(rf".*\.attn2\.{_ATTENTION}"),
    "self_attention": re.compile(rf".*\.attn1\.{_ATTENTION}"),
    "mlp": re.compile(r".*\.ff\.net\.(0\.proj|2)"),
    "projection": re.compile(r".*\.attentions\.\d+\.(proj_in|proj_out)"),
    "conv": re.compile(r".*\.(resnets\.\d+\.(conv1|conv2|conv_shortcut)|(down|up)samplers\.\d+\.conv)"),
    "text_encoder": re.compile(rf"{re.escape(TEXT_ENCODER)}.*\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])"),
}


def target_of(path: str) -> str | None:
    """The target's name that a module path belongs to, or None."""
    return next((name for name, pattern in TARGETS.items() if pattern.fullmatch(path)), None)


def adaptable(unet: nn.Module, text_encoder: nn.Module | None = None) -> list[str]:
    """The paths of all linear and convolution layers, in the networks' order."""
    networks = [("", unet)] + ([] if text_encoder is None else [(TEXT_ENCODER, text_encoder)])
    return [
        prefix + path
        for prefix, network in networks
        for path, module in network.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    ]


def find_targets(unet: nn.Module, names: Sequence[str], text_encoder: nn.Module | None = None) -> list[str]:
    """The paths of the layers that the named targets stand for, in the networks' order.

    Args:
        unet: The network.
        names: Names in `TARGETS`.
        text_encoder: Where the target "text_encoder" is looked for.

    Raises:
        ConfigError: A name matches no layer of this base.
    """
    layers = adaptable(unet, text_encoder)
    found = {name: [path for path in layers if TARGETS[name].fullmatch(path)] for name in names}
    empty = [name for name, paths in found.items() if not paths]
    if empty:
        present = [name for name in TARGETS if any(TARGETS[name].fullmatch(path) for path in layers)]
        raise ConfigError(
            f"lora.targets: {', '.join(map(repr, empty))} matches no layer of this base. "
            f"It has: {', '.join(present) or 'none of the known targets'}."
        )
    wanted = {path for paths in found.values() for path in paths}
    return [path for path in layers if path in wanted]
