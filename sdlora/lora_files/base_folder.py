"""Bases as folders in diffusers' layout, by the weights and names of their layers alone: nothing is computed with them.

Only the UNet and the text encoders are looked at, for no LoRA changes anything else.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from sdlora.errors import BaseModelError, DataError
from sdlora.lora.inject import LoraState
from sdlora.lora.targets import NETWORKS, adaptable, network_of
from sdlora.lora_files.merge import BaseWeights, Place
from sdlora.lora_files.names import first_text_encoder, kohya_name
from sdlora.lora_files.read import family_of
from sdlora.models.architectures import ARCHITECTURES, Architecture
from sdlora.models.safetensors_header import read_header


def empty_networks(base: Path | None, architecture: Architecture = ARCHITECTURES["sd1"]) -> dict[str, nn.Module]:
    """A base's UNet and text encoders by name, without numbers (on the meta device).

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
    try:
        with torch.device("meta"):
            unet = UNet2DConditionModel.from_config(unet_config)
            text = None if text_config is None else CLIPTextModel(CLIPTextConfig(**text_config))
            second = None if second_config is None else CLIPTextModelWithProjection(CLIPTextConfig(**second_config))
    except (TypeError, ValueError, KeyError) as error:
        raise BaseModelError(f"The configs in {base} make no UNet with CLIP text encoders: {error}") from error
    networks = zip(NETWORKS, (unet, text, second), strict=True)
    return {name: network for name, network in networks if network is not None}


def module_paths(
    base: Path | None, architecture: Architecture = ARCHITECTURES["sd1"]
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The layers that a LoRA can be on: kohya module name to module path and weight shape.

    Args and errors are those of `empty_networks`.
    """
    return _layers(empty_networks(base, architecture))


def _layers(networks: dict[str, nn.Module]) -> dict[str, tuple[str, tuple[int, ...]]]:
    first = first_text_encoder(two="text_encoder_2" in networks)
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, network in networks.items():
        found |= layers_by_name(network, "" if name == "unet" else f"{name}.", first)
    return found


def lora_layers(networks: dict[str, nn.Module]) -> dict[str, str]:
    """The layers of networks that a LoRA can be on: kohya module name to the weight's name in `BaseWeights.places`."""
    found = {}
    for layer, (path, _) in _layers(networks).items():
        network = network_of(path)
        found[layer] = f"{network}.{path.removeprefix(f'{network}.').removeprefix('text_model.')}.weight"
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


def folder_weights(base: Path) -> BaseWeights:
    """Where the weights of a folder in diffusers' layout lie.

    Raises:
        BaseModelError: It is no such folder, a network lies there in another kind of file, or a file is broken.
    """
    places: dict[str, list[Place]] = {}
    for file, network in _weight_files(base).items():
        header = read_header(file)
        for key, shape in header.shapes.items():
            if header.dtypes[key].startswith(("I", "U", "BOOL")):
                continue  # position_ids, which only old files have
            # From transformers 5 on, CLIP's weights are no longer inside one named text_model.
            name = f"{network}.{key.removeprefix('text_model.')}"
            places.setdefault(name, []).append(Place(file, key, shape))
    layers = lora_layers(empty_networks(base))
    return BaseWeights(base, places, {layer: name for layer, name in layers.items() if name in places})


def _weight_files(base: Path) -> dict[Path, str]:
    """The safetensors files of a base's UNet and text encoders, with the network they are of."""
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
        files |= dict.fromkeys(found, network)
    return files
