"""Bases as folders in diffusers' layout, by the weights and names of their layers alone: nothing is computed with them.

Floor 2. Only the UNet and the text encoders are looked at, for no LoRA changes anything else.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from sdlora.errors import BaseModelError, DataError, OutputError
from sdlora.files import atomic_folder
from sdlora.lora.formats import family_of
from sdlora.lora.inject import LoraState
from sdlora.lora.keys import first_text_encoder, kohya_name
from sdlora.lora.targets import NETWORKS, adaptable
from sdlora.lora.tools import update
from sdlora.models.architectures import ARCHITECTURES, Architecture


def module_paths(
    base: Path | None, architecture: Architecture = ARCHITECTURES["sd1"]
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The layers that a LoRA can be on: kohya module name to module path and weight shape.

    Args:
        base: A folder in diffusers' layout, of which only the configs are read, or None.
        architecture: What is taken where there is no base.

    Raises:
        BaseModelError: The folder is not there, or its configs are not those of a UNet and CLIP text encoders.
    """
    published = [architecture.unet, *architecture.text_encoders, None][:3]
    unet_config, text_config, second_config = published if base is None else [_config(base, n) for n in NETWORKS]
    if unet_config is None:
        raise BaseModelError(f"{base} holds no unet/config.json, so it is no base in diffusers' layout.")
    first = first_text_encoder(two=second_config is not None)
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    try:
        with torch.device("meta"):
            unet = UNet2DConditionModel.from_config(unet_config)
            text = None if text_config is None else CLIPTextModel(CLIPTextConfig(**text_config))
            second = None if second_config is None else CLIPTextModelWithProjection(CLIPTextConfig(**second_config))
    except (TypeError, ValueError, KeyError) as error:
        raise BaseModelError(f"The configs in {base} make no UNet with CLIP text encoders: {error}") from error
    for network, prefix in ((unet, ""), (text, "text_encoder."), (second, "text_encoder_2.")):
        if network is not None:
            found |= layers_by_name(network, prefix, first)
    return found


def layers_by_name(
    network: nn.Module, prefix: str = "", first_text_encoder: str = "lora_te_"
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """A network's linear and convolution layers: kohya module name to module path and weight shape.

    Args:
        network: A UNet or a text encoder.
        prefix: What its paths begin with; nothing for the UNet.
        first_text_encoder: "lora_te1_" where the family has two text encoders.
    """
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for path in adaptable(network):
        shape = tuple(network.get_parameter(f"{path}.weight").shape)
        found[kohya_name(prefix + path, first_text_encoder=first_text_encoder)] = (prefix + path, shape)
    return found


def _config(base: Path, network: str) -> dict[str, Any] | None:
    file = base / network / "config.json"
    if not file.is_file():
        return None
    try:
        config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BaseModelError(f"{file} is not readable as JSON: {error}.") from error
    return config


def paths_for(state: LoraState, base: Path | None) -> dict[str, str]:
    """Kohya module name to module path, for every module of a LoRA; without a base, in its family as published.

    Raises:
        DataError: A module is not in the base, or of another shape there.
    """
    published = next((a for a in ARCHITECTURES.values() if a.modelspec == family_of(state)), ARCHITECTURES["sd1"])
    known = module_paths(base, published)
    of = published.title if base is None else base.name
    hint = " For another base, give its folder: --base FOLDER." if base is None else ""
    unknown = [name for name in state if name not in known]
    if unknown:
        raise DataError(f"{len(unknown)} modules are not in {of}, the first is {unknown[0]!r}.{hint}")
    for name, weights in state.items():
        shape = (weights.up.shape[0], *weights.down.shape[1:])
        if shape != known[name][1]:
            raise DataError(f"{name!r} makes an update of {shape}, and the layer of {of} has {known[name][1]}.{hint}")
    return {name: known[name][0] for name in state}


def weight_files(base: Path) -> dict[Path, str]:
    """The safetensors files of a base's UNet and text encoders, relative to it, with the network they are of.

    Raises:
        BaseModelError: It is no folder in diffusers' layout, or a network lies there in another kind of file.
    """
    if not (base / "model_index.json").is_file():
        raise BaseModelError(f"{base} holds no model_index.json, so it is no base in diffusers' layout.")
    files: dict[Path, str] = {}
    for network in NETWORKS:
        folder = base / network
        found = sorted(folder.glob("*.safetensors"))
        other = sorted(file.name for ending in ("bin", "ckpt", "msgpack", "h5") for file in folder.glob(f"*.{ending}"))
        if other:
            raise BaseModelError(f"{folder} holds {other[0]}. Only .safetensors are read; save it anew as such.")
        if folder.is_dir() and not found:
            raise BaseModelError(f"{folder} holds no .safetensors.")
        files |= {file.relative_to(base): network for file in found}
    return files


def read_weights(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A base's tensors and metadata.

    Raises:
        BaseModelError: It is not a readable safetensors file.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            return {key: opened.get_tensor(key) for key in opened.keys()}, dict(opened.metadata() or {})  # noqa: SIM118
    except SafetensorError as error:
        raise BaseModelError(f"{file} is not a readable safetensors file: {error}.") from error


def layer_name(key: str, network: str, first: str) -> str | None:
    """The kohya module name that a weight of a base's file belongs to; None for biases."""
    if not key.endswith(".weight"):
        return None
    prefix = "" if network == "unet" else f"{network}."
    return kohya_name(prefix + key.removesuffix(".weight"), first_text_encoder=first)


def _first_text_encoder(base: Path) -> str:
    return first_text_encoder(two=(base / "text_encoder_2").is_dir())


def merge_into(base: Path, output: Path, state: LoraState) -> int:
    """Write a copy of a base in which a LoRA is part of the weights.

    Args:
        base: A folder in diffusers' layout.
        output: The folder to write; it must not be there yet.
        state: A LoRA by kohya module name, without magnitudes. W + Delta is summed in float32 and rounded to W's type.

    Returns:
        How many layers were changed.

    Raises:
        BaseModelError: The base cannot be read.
        DataError: A module is not in the base, or of another shape there.
        OutputError: `output` is there already, or inside the base.
    """
    if output.resolve().is_relative_to(base.resolve()):
        raise OutputError(f"{output} is inside the base. Give an --output beside it.")
    files, first = weight_files(base), _first_text_encoder(base)
    _check_fit(base, files, first, state)
    with atomic_folder(output) as temporary:
        shutil.copytree(base, temporary, dirs_exist_ok=True, ignore=_leave_out({base / file for file in files}))
        for file, network in files.items():
            tensors, metadata = read_weights(base / file)
            for key, weight in tensors.items():
                if (name := layer_name(key, network, first)) in state:
                    delta = update(state[name]).float().reshape(weight.shape)
                    tensors[key] = (weight.float() + delta).to(weight.dtype)
            save_file(tensors, temporary / file, metadata=metadata)
    return len(state)


def _leave_out(files: set[Path]) -> Any:
    return lambda folder, names: [name for name in names if Path(folder) / name in files]


def _check_fit(base: Path, files: dict[Path, str], first: str, state: LoraState) -> None:
    """Look at the headers alone, so that what does not fit is refused before anything is written."""
    missing = set(state)
    for file, network in files.items():
        try:
            with safe_open(base / file, framework="pt") as opened:
                shapes = {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise BaseModelError(f"{base / file} is not a readable safetensors file: {error}.") from error
        for key, shape in shapes.items():
            name = layer_name(key, network, first)
            if name in state:
                own = (state[name].up.shape[0], *state[name].down.shape[1:])
                if own != shape:
                    raise DataError(f"{name!r} makes an update of {own}, and the layer of {base.name} has {shape}.")
                missing.discard(name)
    if missing:
        raise DataError(f"{len(missing)} modules are not in {base.name}, among them {min(missing)!r}.")


def differences(fine_tuned: Path, base: Path) -> tuple[dict[str, Tensor], list[str]]:
    """Fine-tuned minus base, in float32.

    Returns:
        By kohya module name, for the layers that a LoRA can be on and that differ; and the keys of all other weights
        of the UNet and the text encoders that differ, which no LoRA holds.

    Raises:
        BaseModelError: One of them cannot be read.
        DataError: The two have different weights by name or shape.
    """
    known, first = module_paths(base), _first_text_encoder(base)
    ours, theirs = (_all_weights(folder) for folder in (fine_tuned, base))
    if odd := sorted(set(ours) ^ set(theirs)):
        raise DataError(f"{fine_tuned.name} and {base.name} are not of one kind: only one has {odd[0][1]!r}.")
    found: dict[str, Tensor] = {}
    others: list[str] = []
    for (network, key), weight in ours.items():
        own = theirs[network, key]
        if weight.shape != own.shape:
            shapes = f"{tuple(weight.shape)} and {tuple(own.shape)}"
            raise DataError(f"{key!r} has the shapes {shapes} in {fine_tuned.name} and {base.name}.")
        if torch.equal(weight, own):
            continue
        name = layer_name(key, network, first)
        if name in known:
            found[name] = weight.float() - own.float()
        else:
            others.append(f"{network}.{key}")
    return found, others


def _all_weights(folder: Path) -> dict[tuple[str, str], Tensor]:
    """Every weight by network and key; text encoders without the level that transformers 5 left out."""
    found: dict[tuple[str, str], Tensor] = {}
    for file, network in weight_files(folder).items():
        for key, tensor in read_weights(folder / file)[0].items():
            if not tensor.is_floating_point():
                continue  # position_ids, which only old files have
            name = (network, key.removeprefix("text_model."))
            if name in found:
                raise BaseModelError(f"{folder / network} holds {key!r} twice: keep one variant of its weights.")
            found[name] = tensor
    return found
