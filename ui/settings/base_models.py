"""Bases before they are loaded: which there are on this machine, what each is, and settings that fit into its memory.

Files are looked at by their headers and configurations alone; memory is counted by the plan that
`sdlora plan` prints.
"""

from __future__ import annotations

import functools
import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from huggingface_hub import scan_cache_dir, try_to_load_from_cache
from huggingface_hub.errors import CacheNotFound, HFValidationError

from sdlora.common.bundled import pocket_folder
from sdlora.config.schema import RunConfig
from sdlora.config.toml import dump_toml, parse_config
from sdlora.errors import SdloraError
from sdlora.estimate.memory import Setting, changes, need
from sdlora.estimate.meta_model import Shapes, shapes_of_configs, shapes_of_family
from sdlora.models.detect import recognise
from sdlora.models.safetensors_header import read_header
from sdlora.run.arguments import Arguments

from ..state.folders import Studio
from ..state.subprocesses import device_name

_USABLE = 0.9  # of a GPU: the rest is its driver's and the screen's
_OF_MEMORY = ("base", "lora", "train", "preview", "loss")
_OF_IMAGES = ("resolution_px", "class_words", "preservation_folder", "masks")  # what those sections go with


@dataclass(frozen=True)
class Fit:
    """What a recipe needs, and what makes it fit.

    Attributes:
        peak_bytes: At its peak, as it was asked for.
        memory_bytes: What this machine has.
        values: The options to change, by their dotted names; none if it fits.
        told: What each change is and costs, in words.
        fitted_bytes: The peak with all of them.
    """

    peak_bytes: int
    memory_bytes: int
    values: dict[str, Any]
    told: tuple[str, ...]
    fitted_bytes: int


def known_bases(studio: Studio) -> list[str]:
    """What may be chosen as a base: the built-in one, `bases` in the studio's folder, and the hub's cache."""
    own = studio.runs / "bases"
    files = sorted(own.iterdir()) if own.is_dir() else []
    found = [str(f.resolve()) for f in files if f.suffix == ".safetensors" or (f / "model_index.json").is_file()]
    try:
        repos = scan_cache_dir().repos if studio.any_folder else ()
    except CacheNotFound:
        repos = ()
    cached = sorted(repo.repo_id for repo in repos if _cached(repo.repo_id) is not None)
    return ["pocket", *found, *cached]


def shapes_of(path: str) -> Shapes | None:
    """What a base is made of; None if it is not on this machine, or cannot be told before it is loaded."""
    folder = pocket_folder() if path == "pocket" else Path(path).expanduser()
    try:
        if folder.is_file():
            return shapes_of_family(recognise(read_header(folder), folder.name).family)
        if not folder.is_dir():
            folder = _cached(path) or folder
        return _shapes_of_folder(folder)
    except (OSError, ValueError, KeyError, SdloraError):
        return None  # what is wrong with it is told when it is loaded, by the code that knows


def fit(config: RunConfig) -> Fit | None:
    """What a recipe needs on this machine and what makes it fit; None if its base is not on this machine.

    Args:
        config: The recipe.
    """
    device = device_name(config.train.device)
    # To 64 MB, so that what was counted a moment ago still counts.
    memory_bytes = room_bytes(device) >> 26 << 26
    document = tomllib.loads(dump_toml(config))
    kept = {section: document[section] for section in _OF_MEMORY if section in document}
    # A trigger is nothing to memory, but class words need one.
    data = {name: document["data"][name] for name in _OF_IMAGES if name in document["data"]}
    data |= {"folder": "none", "trigger": "trigger"}
    return _fit(json.dumps(kept | {"data": data}), device == "cpu", memory_bytes)


def room_bytes(device: str) -> int:
    """The memory that a run may use: what is free, or on a GPU, which runs have to themselves, nearly all of it."""
    if device.startswith("cuda") and torch.cuda.is_available():
        return int(_USABLE * torch.cuda.get_device_properties(device).total_memory)
    return int(psutil.virtual_memory().available)


@functools.lru_cache(maxsize=64)
def _fit(document: str, on_cpu: bool, memory_bytes: int) -> Fit | None:
    config = parse_config(json.loads(document), name="plan")
    shapes = shapes_of(config.base.path)
    if shapes is None:
        return None
    precision = config.train.precision
    half = precision in ("bf16", "fp16") or (precision == "auto" and not on_cpu)
    edge = config.data.resolution_px or shapes.resolution_px
    dtype = torch.bfloat16 if half else torch.float32
    setting = Setting(config, Arguments(config).adapter.spec, shapes, dtype, (edge, edge), on_cpu=on_cpu)
    needed = need(setting)
    found = changes(setting, needed, memory_bytes)
    values: dict[str, Any] = {}
    for change in found:
        for line in change.change.split(" and "):
            name, value = line.split(" = ", 1)
            values[name] = tomllib.loads(f"value = {value}")["value"]
    told = tuple(f"{change.change} ({change.price})" for change in found)
    last = found[-1].peak_bytes if found else needed.peak_bytes
    return Fit(needed.peak_bytes, memory_bytes, values, told, last)


def _shapes_of_folder(folder: Path) -> Shapes:
    def read(part: str) -> Mapping[str, Any]:
        found: Mapping[str, Any] = json.loads((folder / part / "config.json").read_text(encoding="utf-8"))
        return found

    parts = [part for part in ("text_encoder", "text_encoder_2") if (folder / part).is_dir()]
    return shapes_of_configs(read("unet"), read("vae"), [read(part) for part in parts])


def _cached(repository: str) -> Path | None:
    """Where the hub's cache keeps a diffusers model."""
    try:
        found = try_to_load_from_cache(repository, "model_index.json")
    except HFValidationError:
        return None
    return Path(found).parent if isinstance(found, str) else None
