"""Presets: the configurations that come with sdlora, as starting points for a family of base models.

Listed by `sdlora presets`, used by the studio's recipes and named where a configuration does not fit its base model.
"""

from __future__ import annotations

import json
import tomllib
from functools import cache
from typing import NamedTuple

from sdlora.common.bundled import counted_file, shipped_config, shipped_configs
from sdlora.config.toml import read_config


class Preset(NamedTuple):
    """A bundled configuration.

    Attributes:
        purpose: The first line of its file.
        peak_bytes: Memory at the base's own resolution on a GPU with bf16, counted at the family's true shapes.
        flops_per_exposure: Arithmetic of training on one image once.
    """

    name: str
    family: str
    purpose: str
    peak_bytes: int
    flops_per_exposure: int


@cache
def presets() -> tuple[Preset, ...]:
    """All bundled configurations but those that only others extend, by name."""
    found, shared = [], set()
    counted = json.loads(counted_file().read_text(encoding="utf-8"))
    for name in shipped_configs():
        file = shipped_config(name)
        assert file is not None, "it is listed"
        text = file.read_text(encoding="utf-8")
        shared.add(tomllib.loads(text).get("extends"))
        family = read_config(name)[0].get("base", {}).get("family", "any")
        figures = counted.get(name, {"peak_bytes": 0, "flops_per_exposure": 0})
        found.append(Preset(name, family, text.partition("\n")[0].lstrip("# "), **figures))
    return tuple(preset for preset in found if preset.name not in shared)
