"""Presets: the configurations that come with sdlora, as starting points for a family of base models.

Listed by `sdlora presets`, used by the studio's recipes and named where a configuration does not fit its base model.
"""

from __future__ import annotations

import tomllib
from functools import cache
from typing import NamedTuple

from sdlora.common.bundled import shipped_config, shipped_configs
from sdlora.config.toml import read_config


class Preset(NamedTuple):
    """A bundled configuration; the purpose is the first line of its file."""

    name: str
    family: str
    purpose: str


@cache
def presets() -> tuple[Preset, ...]:
    """All bundled configurations but those that only others extend, by name."""
    found, shared = [], set()
    for name in shipped_configs():
        file = shipped_config(name)
        assert file is not None, "it is listed"
        text = file.read_text(encoding="utf-8")
        shared.add(tomllib.loads(text).get("extends"))
        family = read_config(name)[0].get("base", {}).get("family", "any")
        found.append(Preset(name, family, text.partition("\n")[0].lstrip("# ")))
    return tuple(preset for preset in found if preset.name not in shared)
