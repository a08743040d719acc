"""What a folder in diffusers' layout holds, checked before any weights are read: its class, its parts, its types."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from sdlora.errors import BaseModelError
from sdlora.models.architectures import read_header
from sdlora.models.base import BaseModel
from sdlora.models.families import FAMILIES, class_of_pipeline

_PLAIN = "Train on the base model that it was made from; the LoRA works on both."
_REFUSED = {
    "Inpaint": f"an inpainting model. {_PLAIN}",
    "Depth2Img": f"a depth model. {_PLAIN}",
    "InstructPix2Pix": f"a model that edits images. {_PLAIN}",
    "StableDiffusionXLImg2Img": "the refiner of Stable Diffusion XL, which only refines finished images. Train on the "
    "base model.",
}


# What diffusers' and transformers' readers raise where a file, or a configuration beside it, is not as they expect.
LOADER_ERRORS = (OSError, ValueError, LookupError, RuntimeError, AttributeError, TypeError, SafetensorError)


def text_dtypes(kind: type[BaseModel], folder: Path) -> dict[str, torch.dtype]:
    """The types of text encoders that keep that of their files; all others are in float32."""
    found = {}
    for part in kind.text_parts if kind.keeps_text_type else ():
        if not (files := sorted((folder / part).glob("*.safetensors"))):
            continue
        first = read_header(files[0])
        found[part] = torch.float32 if "F32" in first.dtypes.values() else torch.bfloat16
    return found


def read_index(folder: Path) -> dict[str, Any]:
    """The content of a diffusers folder's index."""
    index = folder / "model_index.json"
    try:
        entries = json.loads(index.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BaseModelError(f"{index} is not valid JSON: {error}.") from error
    if not isinstance(entries, dict):
        raise BaseModelError(f"{index} is not valid JSON: it has no entries.")
    return entries


def part_config(folder: Path, part: str) -> dict[str, Any] | None:
    """The configuration of a part of a diffusers folder, or None."""
    file = folder / part / "config.json"
    if not file.is_file():
        return None
    config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return config


def check_folder(
    path: str, folder: Path, parts_for: type[BaseModel] | None = None, given: Collection[str] = ()
) -> type[BaseModel]:
    """The class of a diffusers folder, which must be supported and complete.

    With `parts_for` it gives the text encoder and the VAE of a transformer of this class, but for those that are given.
    """
    index = folder / "model_index.json"
    if not index.is_file():
        lora = any(read_header(file).has("unet.", "lora_") for file in sorted(folder.glob("*lora*.safetensors")))
        what = (
            "it is a LoRA; set base.path to the model that it was trained on" if lora else "it is not a diffusers model"
        )
        raise BaseModelError(f"Folder {path!r} has no model_index.json: {what}.")
    entries = read_index(folder)
    kind = str(entries.get("_class_name"))
    if parts_for is not None and kind != parts_for.names.pipeline:
        raise BaseModelError(
            f"base.components = {path!r} is a {kind}, and base.path a transformer of {parts_for.names.title}. Name a "
            "folder or a Hub id of that."
        )
    if refused := next((sentence for mark, sentence in _REFUSED.items() if mark in kind), None):
        raise BaseModelError(f"{path!r} is {refused}")
    found = class_of_pipeline(kind)
    if found is None:
        titles = [names.title for names in FAMILIES.values()]
        raise BaseModelError(
            f"{path!r} is a {kind}, which sdlora does not train. It trains {', '.join(titles[:-1])} and {titles[-1]}."
        )
    for part in found.text_parts:
        if part in given:
            continue
        if not (folder / part).is_dir() or None in (entries.get(part) or [None]):
            raise BaseModelError(f"Base model {path!r} has no {part}, without which captions cannot be encoded.")
    if found.keeps_text_type and (missing := _without_weights(folder, found, given)) is not None:
        raise BaseModelError(f"Base model {path!r} has no {missing} (no .safetensors file in it). Download it again.")
    for part in (found.network_name, "vae", *found.text_parts):
        for file in sorted((folder / part).glob("*.safetensors")):
            read_header(file)
    return found


def _without_weights(folder: Path, kind: type[BaseModel], given: Collection[str]) -> str | None:
    """The first of VAE and text encoders that has no weights and is not given."""
    parts = [part for part in ("vae", *kind.text_parts) if part not in given]
    return next((part for part in parts if not [*(folder / part).glob("*.safetensors")]), None)
