"""Trains LoRAs for diffusion models, and checks every epoch for copies of its training images.

The public Python API is the few names below, each loaded when it is first used; the rest is the command line.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from sdlora.common.version import __version__

if TYPE_CHECKING:
    from sdlora.common.bundled import pocket_folder
    from sdlora.lora_files.timestep_ranks import apply_timestep_rank

__all__ = ["__version__", "apply_timestep_rank", "pocket_folder"]

_HOMES = {"apply_timestep_rank": "sdlora.lora_files.timestep_ranks", "pocket_folder": "sdlora.common.bundled"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'sdlora' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
