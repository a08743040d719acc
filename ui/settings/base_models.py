"""Base models before they are loaded: which are on this machine, their shapes, and settings that fit into its memory.

Only headers and configurations of their files are read; memory is estimated as by `sdlora plan`.
"""

from __future__ import annotations

import functools
import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import scan_cache_dir, try_to_load_from_cache
from huggingface_hub.errors import CacheNotFound, HFValidationError

from sdlora.common.bundled import pocket_folder
from sdlora.config.schema import RunConfig
from sdlora.config.toml import dump_toml, parse_config
from sdlora.errors import SdloraError
from sdlora.estimate.meta_model import Shapes, shapes_of_configs, shapes_of_family
from sdlora.models.detect import identify, read_header
from sdlora.run.estimate import Estimate, device_memory, estimate_shapes

from ..state.folders import Studio
from ..state.subprocesses import device_name

_USABLE = 0.9  # of a GPU: the rest is its driver's and the screen's
_OF_MEMORY = ("base", "lora", "train", "preview", "loss")
_OF_IMAGES = ("resolution_px", "class_words", "preservation_folder", "masks")  # what those sections go with


def known_bases(studio: Studio) -> list[str]:
    """The base models to choose from: the built-in one, `bases` in the studio's folder, and the hub's cache."""
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
    """The shapes of a base model; None if it is not on this machine, or not known before it is loaded."""
    folder = pocket_folder() if path == "pocket" else Path(path).expanduser()
    try:
        if folder.is_file():
            return shapes_of_family(identify(read_header(folder), folder.name).family)
        if not folder.is_dir():
            folder = _cached(path) or folder
        return _shapes_of_folder(folder)
    except (OSError, ValueError, KeyError, SdloraError):
        return None  # loading it says what is wrong


def estimate(config: RunConfig) -> Estimate | None:
    """What a recipe needs on this machine, and what to set if it does not fit; None if its base model is not here."""
    device = device_name(config.train.device)
    # Down to a multiple of 64 MiB, so that the last estimate can be reused.
    memory_bytes = usable_memory(device) >> 26 << 26
    document = tomllib.loads(dump_toml(config))
    kept = {section: document[section] for section in _OF_MEMORY if section in document}
    # The trigger takes no memory, but class words need one.
    data = {name: document["data"][name] for name in _OF_IMAGES if name in document["data"]}
    data |= {"folder": "none", "trigger": "trigger"}
    return _estimate(json.dumps(kept | {"data": data}), device == "cpu", memory_bytes)


def usable_memory(device: str) -> int:
    """The bytes that a run may use: what is free, or on a GPU, which runs have to themselves, nearly all of it."""
    if device.startswith("cuda") and torch.cuda.is_available():
        return int(_USABLE * torch.cuda.get_device_properties(device).total_memory)
    return device_memory(torch.device("cpu"))


@functools.lru_cache(maxsize=64)
def _estimate(document: str, on_cpu: bool, memory_bytes: int) -> Estimate | None:
    config = parse_config(json.loads(document), name="plan")
    shapes = shapes_of(config.base.path)
    return None if shapes is None else estimate_shapes(config, shapes, memory_bytes, on_cpu=on_cpu)


def _shapes_of_folder(folder: Path) -> Shapes:
    def read(part: str) -> Mapping[str, Any]:
        found: Mapping[str, Any] = json.loads((folder / part / "config.json").read_text(encoding="utf-8"))
        return found

    parts = [part for part in ("text_encoder", "text_encoder_2") if (folder / part).is_dir()]
    return shapes_of_configs(read("unet"), read("vae"), [read(part) for part in parts])


def _cached(repository: str) -> Path | None:
    """A model's folder in the hub's cache; None if it is not there."""
    try:
        found = try_to_load_from_cache(repository, "model_index.json")
    except HFValidationError:
        return None
    return Path(found).parent if isinstance(found, str) else None
