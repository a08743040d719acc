"""From what the user calls a base ("pocket", a folder, a hub id) to a loaded model.

Floor 3. Only safetensors are read: a pickled checkpoint can run code.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline

from sdlora.errors import BaseModelError
from sdlora.models.base import BaseModel
from sdlora.models.sd import StableDiffusion
from sdlora.shipped import pocket_folder

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def load_base(
    path: str, *, device: torch.device, dtype: torch.dtype, revision: str | None = None, variant: str | None = None
) -> BaseModel:
    """Load a base model.

    Args:
        path: "pocket", a folder in diffusers' layout, or a hub id such as "owner/name".
        device: Where to compute.
        dtype: The frozen UNet's type.
        revision: A branch, tag or commit on the hub.
        variant: The files' variant, such as "fp16".

    Raises:
        BaseModelError: Nothing is there, it cannot be read, or it is not a Stable Diffusion 1.x text-to-image model.
    """
    source = _locate(path)

    def reload() -> StableDiffusionPipeline:
        return _load_pipeline(path, source, revision, variant)

    return StableDiffusion(reload(), path=path, device=device, dtype=dtype, reload=reload)


def _locate(path: str) -> str:
    """The folder or hub id to load from."""
    if path == "pocket":
        return str(pocket_folder())
    folder = Path(path).expanduser()
    if folder.is_dir():
        _check_folder(path, folder)
        return str(folder)
    if folder.is_file():
        raise BaseModelError(
            f"The base {path!r} is a single file. Give a folder in diffusers' layout (it holds model_index.json), "
            "which diffusers' StableDiffusionPipeline.from_single_file(...).save_pretrained(...) makes of one."
        )
    if _HUB_ID.fullmatch(path):
        return path
    raise BaseModelError(
        f"There is no base {path!r}. base.path takes 'pocket' (built in), a folder that holds model_index.json, "
        "or a hub id such as 'owner/name'."
    )


def _check_folder(path: str, folder: Path) -> None:
    index = folder / "model_index.json"
    if not index.is_file():
        raise BaseModelError(f"The folder {path!r} holds no model_index.json, so it is no diffusers model.")
    try:
        kind = json.loads(index.read_text(encoding="utf-8")).get("_class_name")
    except (ValueError, AttributeError) as error:
        raise BaseModelError(f"{index} is not readable as JSON: {error}.") from error
    if kind != "StableDiffusionPipeline":
        raise BaseModelError(f"{path!r} is a {kind}. sdlora trains StableDiffusionPipeline models (SD 1.x).")


def _load_pipeline(path: str, source: str, revision: str | None, variant: str | None) -> StableDiffusionPipeline:
    try:
        pipeline = StableDiffusionPipeline.from_pretrained(
            source,
            revision=revision,
            variant=variant,
            torch_dtype=torch.float32,
            use_safetensors=True,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BaseModelError(
            f"The base {path!r} could not be loaded: {first_line} "
            "Check the spelling, the network if it is a hub id, and that its weights are .safetensors files."
        ) from error
    if not isinstance(pipeline, StableDiffusionPipeline):
        raise BaseModelError(f"{path!r} is a {type(pipeline).__name__}. sdlora trains StableDiffusionPipeline models.")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
