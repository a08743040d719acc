"""From base.path ("pocket", a folder, a file, a hub id) to a loaded base model.

Only safetensors files are read: a pickled checkpoint can run code.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from torch import nn

from sdlora.common.bundled import pocket_folder
from sdlora.diffusion.noise import PredictionType
from sdlora.errors import BaseModelError
from sdlora.lora.quantize import Quantization, quantize_linears
from sdlora.models.base import BaseModel
from sdlora.models.latent_diffusion import Source
from sdlora.models.safetensors_header import read_header
from sdlora.models.sd import StableDiffusion
from sdlora.models.sd2 import StableDiffusion2
from sdlora.models.sdxl import StableDiffusionXL
from sdlora.models.single_file import load_single_file
from sdlora.models.text import TextOptions

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_PIPELINES = {
    "StableDiffusionPipeline": StableDiffusionPipeline,
    "StableDiffusionXLPipeline": StableDiffusionXLPipeline,
}
_PLAIN = "Train on the base model that it was made from; the LoRA works on both."
_REFUSED = {
    "Inpaint": f"an inpainting model. {_PLAIN}",
    "Depth2Img": f"a depth model. {_PLAIN}",
    "InstructPix2Pix": f"a model that edits images. {_PLAIN}",
    "StableDiffusionXLImg2Img": "the refiner of Stable Diffusion XL, which only refines finished images. Train on the "
    "base model.",
}
_OTHER = "which sdlora does not train. It trains Stable Diffusion 1.x, 2.x and XL."


@dataclass(frozen=True)
class LoadOptions:
    """How to load a base model.

    Attributes:
        revision: A branch, tag or commit on the hub; None for the default.
        variant: The variant of the weight files, such as "fp16".
        prediction_type: Overrides the prediction type in its files.
        text: How captions are encoded.
        quantization: The format of the linear weights in the UNet's attention blocks, or "none".
    """

    revision: str | None = None
    variant: str | None = None
    prediction_type: PredictionType | None = None
    text: TextOptions = field(default_factory=TextOptions)
    quantization: Quantization | Literal["none"] = "none"


def load_base(path: str, *, device: torch.device, dtype: torch.dtype, options: LoadOptions | None = None) -> BaseModel:
    """Load a base model.

    Args:
        path: "pocket", a folder in diffusers' layout, a checkpoint in one .safetensors file, or a hub id such as
            "owner/name".
        device: Where to compute.
        dtype: The frozen UNet's dtype.
        options: How to load it.

    Raises:
        BaseModelError: It does not exist, cannot be read, or is not a text-to-image model of a known family.
        ConfigError: An option does not fit the family.
    """
    options = options or LoadOptions()
    load, revision = _loader(path, options)

    def reload(unet_dtype: torch.dtype, **present: Any) -> DiffusionPipeline:
        pipeline = load(unet_dtype=unet_dtype, **present)
        if options.prediction_type is not None:
            pipeline.scheduler.register_to_config(prediction_type=options.prediction_type)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    # Quantization rounds the weights as they were stored, not those of the compute dtype.
    first = reload(dtype if options.quantization == "none" else torch.float32)
    source = Source(first, path, revision, reload)
    family = _family(source)
    if options.quantization != "none":
        # Before it moves to a device that may be too small for the unquantized weights.
        quantize_linears(source.pipeline.unet, options.quantization)
        # The other weights still point into the mapped file, which would keep the unquantized ones in memory as well.
        for parameter in source.pipeline.unet.parameters():
            parameter.data = parameter.data.clone()
    return family(source, device=device, dtype=dtype, text=options.text)


def _family(source: Source) -> type[StableDiffusion] | type[StableDiffusionXL]:
    """The family by the UNet's layers: nothing else distinguishes 1.x from 2.x at any size."""
    unet = source.pipeline.unet
    if unet.config.addition_embed_type == "text_time":
        return StableDiffusionXL
    projections = (module for name, module in unet.named_modules() if name.endswith(".proj_in"))
    linear = isinstance(next(projections, None), nn.Linear)
    return StableDiffusion2 if linear else StableDiffusion


def _loader(path: str, options: LoadOptions) -> tuple[Callable[..., DiffusionPipeline], str | None]:
    """A function that loads the pipeline, and the commit that a hub id was resolved to."""
    if path == "pocket":
        return partial(_load_folder, path, pocket_folder(), None), None
    place = Path(path).expanduser()
    if place.is_dir():
        return partial(_load_folder, path, place, options.variant), None
    if place.is_file():
        return partial(load_single_file, path, place, options.prediction_type), None
    if _HUB_ID.fullmatch(path):
        snapshot = _download(path, options)
        # In the hub's cache a snapshot's folder is named by its commit.
        return partial(_load_folder, path, snapshot, options.variant), snapshot.name
    raise BaseModelError(
        f"Base model {path!r} was not found. base.path takes 'pocket' (built in), a folder with a model_index.json, a "
        ".safetensors checkpoint, or a hub id such as 'owner/name'."
    )


def _download(path: str, options: LoadOptions) -> Path:
    """The folder of a hub id's files in the hub's cache, downloaded if necessary."""
    try:
        folder = DiffusionPipeline.download(
            path, revision=options.revision, variant=options.variant, use_safetensors=True, safety_checker=None
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise _not_loaded(path, error) from error
    return Path(folder)


def _load_folder(
    path: str, folder: Path, variant: str | None, unet_dtype: torch.dtype, **present: Any
) -> DiffusionPipeline:
    """Load a diffusers folder; `present` are components that are in memory already."""
    kind = _check_folder(path, folder)
    absent = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    try:
        pipeline: DiffusionPipeline = _PIPELINES[kind].from_pretrained(
            folder,
            variant=variant,
            # The UNet's dtype at once: SDXL's takes 10 GB in float32, which a small machine does not have.
            dtype={"unet": unet_dtype, "default": torch.float32},
            use_safetensors=True,
            **present,
            **(absent if kind == "StableDiffusionPipeline" else {"add_watermarker": False}),
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise _not_loaded(path, error) from error
    return pipeline


def _not_loaded(path: str, error: Exception) -> BaseModelError:
    reason = str(error).strip().splitlines() or [type(error).__name__]
    return BaseModelError(
        f"Base model {path!r} could not be loaded: {reason[0]} Check the spelling, the network if it is a hub id, and "
        "that its weights are .safetensors files (base.variant = 'fp16' if their names say so)."
    )


def _check_folder(path: str, folder: Path) -> str:
    """The pipeline class of a diffusers folder, after checking that it is supported and complete."""
    index = folder / "model_index.json"
    if not index.is_file():
        lora = any(read_header(file).has("unet.", "lora_") for file in sorted(folder.glob("*lora*.safetensors")))
        what = (
            "it is a LoRA; set base.path to the model that it was trained on" if lora else "it is not a diffusers model"
        )
        raise BaseModelError(f"Folder {path!r} has no model_index.json: {what}.")
    try:
        entries = json.loads(index.read_text(encoding="utf-8"))
        kind = str(entries.get("_class_name"))
    except (ValueError, AttributeError) as error:
        raise BaseModelError(f"{index} is not valid JSON: {error}.") from error
    refused = next((sentence for mark, sentence in _REFUSED.items() if mark in kind), None)
    if refused is not None:
        raise BaseModelError(f"{path!r} is {refused}")
    if kind not in _PIPELINES:
        raise BaseModelError(f"{path!r} is a {kind}, {_OTHER}")
    encoders = ["text_encoder", *(["text_encoder_2"] if kind == "StableDiffusionXLPipeline" else [])]
    for part in encoders:
        if not (folder / part).is_dir() or None in (entries.get(part) or [None]):
            raise BaseModelError(f"Base model {path!r} has no {part}, without which captions cannot be encoded.")
    for part in ("unet", "vae", *encoders):
        for file in sorted((folder / part).glob("*.safetensors")):
            read_header(file)
    return kind
