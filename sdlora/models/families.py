"""The registry: every family's class by its name, and the family of what is loaded or lies on the disk."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from torch import nn

from sdlora.common.families import Family
from sdlora.models.architectures import Architecture, FamilyNames, Header, Identified, identify, read_header
from sdlora.models.base import BaseModel
from sdlora.models.flux2 import Flux2Klein, Flux2Klein9B
from sdlora.models.network_file import bare_shapes, check_readable
from sdlora.models.sd import StableDiffusion
from sdlora.models.sd2 import StableDiffusion2
from sdlora.models.sdxl import StableDiffusionXL
from sdlora.models.z_image import ZImage

CLASSES: dict[Family, type[BaseModel]] = {
    "sd1": StableDiffusion,
    "sd2": StableDiffusion2,
    "sdxl": StableDiffusionXL,
    "z-image": ZImage,
    "flux2-klein-4b": Flux2Klein,
    "flux2-klein-9b": Flux2Klein9B,
}
FAMILIES: dict[Family, FamilyNames] = {family: kind.names for family, kind in CLASSES.items()}


def family_named(modelspec: str) -> Family:
    """The family of a ModelSpec architecture name such as "stable-diffusion-v2-768-v"."""
    return next(family for family, names in FAMILIES.items() if modelspec.startswith(names.modelspec))


def identify_base(header: Header, name: str) -> Identified:
    """Identify a base model in one file: a checkpoint, see `identify`, or a flow-matching transformer alone.

    Raises:
        BaseModelError: It is something else.
    """
    shapes = bare_shapes(header)
    for family, kind in CLASSES.items():
        if (config := kind.file_config(shapes)) is not None and kind.fits(config):
            _, vae, texts = kind.true_configs()
            names = {own.name: getattr(kind.names, own.name) for own in fields(FamilyNames)}
            shape = Architecture(
                **names, unet=dict(config), vae=dict(vae), text_encoders=(*map(dict, texts),), scheduler={}
            )
            return Identified(family, None, False, shape)
    return identify(header, name)


def is_transformer(found: Identified) -> bool:
    """Whether a file holds a transformer alone."""
    return CLASSES[found.family].network_name == "transformer"


def class_of_pipeline(name: str) -> type[BaseModel] | None:
    """A class of base models that diffusers loads with a pipeline class of this name; None if none does.

    Stable Diffusion 1.x and 2.x share one, as FLUX.2 klein's sizes do.
    """
    return next((kind for kind in CLASSES.values() if kind.names.pipeline == name), None)


def class_of(pipeline: DiffusionPipeline) -> type[BaseModel]:
    """The class of a loaded pipeline."""
    # Nothing but the layers of their UNets distinguishes 1.x from 2.x and XL at any size.
    if (unet := getattr(pipeline, "unet", None)) is None:
        found = _of_network(type(pipeline.transformer).__name__, dict(pipeline.transformer.config))
        assert found is not None, "loading refuses pipelines of other families"
        return CLASSES[found]
    if unet.config.addition_embed_type == "text_time":
        return StableDiffusionXL
    projections = (module for name, module in unet.named_modules() if name.endswith(".proj_in"))
    return StableDiffusion2 if isinstance(next(projections, None), nn.Linear) else StableDiffusion


def network_of(pipeline: DiffusionPipeline) -> Any:
    """The network of a pipeline that adapters train."""
    return getattr(pipeline, class_of(pipeline).network_name)


def family_on_disk(path: str) -> Family | None:
    """The family of a base model by its header or configuration, without its weights; None if it is not on the disk.

    Raises:
        BaseModelError: It is a file that is no base model.
    """
    place = Path(path).expanduser()
    if place.is_file():
        check_readable(place, path)
        return identify_base(read_header(place), path).family
    if (transformer := _configuration(place / "transformer")) is not None:
        return _of_network(str(transformer.get("_class_name")), transformer)
    unet = _configuration(place / "unet")
    if unet is None:
        return None  # a hub id, or a folder that loading it will say more about
    if unet.get("addition_embed_type") == "text_time":
        return "sdxl"
    return "sd2" if unet.get("use_linear_projection") else "sd1"


def _of_network(name: str, config: Mapping[str, Any]) -> Family | None:
    """The family of a network of a class and a configuration of diffusers."""
    kinds = ((family, kind) for family, kind in CLASSES.items() if kind.network_class == name)
    return next((family for family, kind in kinds if kind.fits(config)), None)


def suits(made_for: str, found: str | None) -> bool:
    """Whether settings that are made for a family, or "any", suit a base model of another; None is not known yet."""
    if found is None or made_for in ("any", found):
        return True
    # Sizes of one model share their presets.
    own, other = (FAMILIES[name].presets if name in FAMILIES else None for name in (made_for, found))
    return own is not None and own == other


def _configuration(part: Path) -> dict[str, Any] | None:
    try:
        config: dict[str, Any] = json.loads((part / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return config
