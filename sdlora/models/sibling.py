"""The distilled sibling of a base model, which draws in a few steps without guidance: its network and its scheduler.

Previews are drawn by it (`preview.base`). VAE and text encoder are the base model's, which siblings share.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import nn

from sdlora.errors import BaseModelError, ConfigError
from sdlora.lora.block_offload import BlockOffload
from sdlora.lora.quantize import quantize_linears
from sdlora.models.architectures import read_header
from sdlora.models.base import BaseModel
from sdlora.models.families import CLASSES, family_on_disk, identify_base
from sdlora.models.folder import LOADER_ERRORS
from sdlora.models.load import LoadOptions, download, is_hub_id
from sdlora.models.network_file import check_readable, empty_network, read_transformer


class SiblingParts(NamedTuple):
    """What a sibling has of its own."""

    network: nn.Module  # on the CPU, frozen
    scheduler: Any  # None where it lies in a file without one
    blocks: BlockOffload | None  # keeps its blocks on the host, as those of the base model are


def load_sibling(path: str, base: BaseModel, *, dtype: torch.dtype, options: LoadOptions) -> SiblingParts:
    """Load the network of a model of the same family and shape.

    Args:
        path: A diffusers folder, a hub id, or a transformer in one .safetensors file; nothing else is read of it.
        base: The base model, with or without an adapter.
        dtype: Of the network.
        options: Those of the base model; its `variant`, `quantization`, `offload` and `change` count.

    Raises:
        BaseModelError: It does not exist, or is of another family or shape.
        ConfigError: The family has no such siblings.
    """
    kind = type(base)
    if kind.few_steps is None:
        raise ConfigError(
            "preview.base and base.training_adapter are for families with a distilled model, such as Z-Image and "
            f"FLUX.2 klein, and {base.path!r} is {kind.names.title}. Leave them unset."
        )
    first = dtype if options.quantization == "none" and options.change is None else torch.float32
    place = Path(path).expanduser()
    if place.is_file():
        check_readable(place, path)
        found = identify_base(read_header(place), path)
        _check_family(path, kind, CLASSES[found.family])
        network = read_transformer(place, kind.network_class, found.architecture.unet, first, path)
        scheduler = None
    else:
        network, scheduler = _from_folder(path, _folder(path, options), kind, first, options.variant)
    _check_shape(path, base, network)
    if options.change is not None:
        options.change({"unet": network}, {"unet"})
    if options.quantization != "none":
        quantize_linears(network, options.quantization, kind.packed_blocks)
        for parameter in network.parameters():  # out of the mapped file
            parameter.data = parameter.data.clone()
    network = network.to(dtype).requires_grad_(False).eval()
    blocks = BlockOffload(network, kind.block_lists, base.device) if options.offload else None
    return SiblingParts(network, scheduler, blocks)


def _folder(path: str, options: LoadOptions) -> Path:
    place = Path(path).expanduser()
    if place.is_dir():
        return place
    if not is_hub_id(path):
        raise BaseModelError(
            f"preview.base = {path!r} was not found. It takes a folder with a model_index.json, a transformer in one "
            ".safetensors file, or a hub id such as 'owner/name'."
        )
    own = LoadOptions(variant=options.variant)
    return download(path, own, vae=None, text_encoder=None, tokenizer=None)


def _from_folder(
    path: str, folder: Path, kind: type[BaseModel], dtype: torch.dtype, variant: str | None
) -> tuple[nn.Module, Any]:
    family = family_on_disk(str(folder))
    _check_family(path, kind, None if family is None else CLASSES[family])
    try:
        network: nn.Module = getattr(diffusers, kind.network_class).from_pretrained(
            folder, subfolder=kind.network_name, torch_dtype=dtype, use_safetensors=True, variant=variant
        )
        has_own = (folder / "scheduler" / "scheduler_config.json").is_file()
        scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler") if has_own else None
    except LOADER_ERRORS as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise BaseModelError(f"preview.base = {path!r} could not be loaded: {reason[0]}") from error
    return network, scheduler


def _check_family(path: str, kind: type[BaseModel], found: type[BaseModel] | None) -> None:
    if found is not kind:
        what = "no transformer that sdlora knows" if found is None else found.names.title
        raise BaseModelError(
            f"preview.base = {path!r} is {what}, and the base model is {kind.names.title}: the LoRA does not fit it. "
            "Name the distilled model of that family."
        )


def _check_shape(path: str, base: BaseModel, network: nn.Module) -> None:
    expected = empty_network(base.network_class, base.network.config).state_dict()
    own = network.state_dict()
    differs = sorted(
        name
        for name in expected.keys() | own.keys()
        if name not in own or name not in expected or own[name].shape != expected[name].shape
    )
    if differs:
        raise BaseModelError(
            f"preview.base = {path!r} has another shape than {base.path!r}: {len(differs)} weights differ, the first "
            f"is {differs[0]!r}. Name a model that was distilled from the same base model."
        )
