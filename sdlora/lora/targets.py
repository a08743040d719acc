"""Which modules of a UNet an adapter may sit on, by the names that users know.

Floor 2.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn

from sdlora.errors import ConfigError

_ATTENTION = r"(to_q|to_k|to_v|to_out\.0)"
TARGETS: dict[str, re.Pattern[str]] = {
    "cross_attention": re.compile(rf".*\.attn2\.{_ATTENTION}"),
    "self_attention": re.compile(rf".*\.attn1\.{_ATTENTION}"),
    "mlp": re.compile(r".*\.ff\.net\.(0\.proj|2)"),
}


def target_of(path: str) -> str | None:
    """The target's name that a module path belongs to, or None."""
    return next((name for name, pattern in TARGETS.items() if pattern.fullmatch(path)), None)


def find_targets(unet: nn.Module, names: Sequence[str]) -> list[str]:
    """The paths of the linear layers that the named targets stand for, in the network's order.

    Args:
        unet: The network.
        names: Names in `TARGETS`.

    Raises:
        ConfigError: A name matches no linear layer of this network.
    """
    linear = [path for path, module in unet.named_modules() if isinstance(module, nn.Linear)]
    found = {name: [path for path in linear if TARGETS[name].fullmatch(path)] for name in names}
    empty = [name for name, paths in found.items() if not paths]
    if empty:
        present = [name for name in TARGETS if any(TARGETS[name].fullmatch(path) for path in linear)]
        raise ConfigError(
            f"lora.targets: {', '.join(map(repr, empty))} matches no layer of this base. "
            f"It has: {', '.join(present) or 'none of the known targets'}."
        )
    wanted = {path for paths in found.values() for path in paths}
    return [path for path in linear if path in wanted]
