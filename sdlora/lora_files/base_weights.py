"""Base models on the disk: where their weights lie, and which of their layers a LoRA can be on.

Merging and extracting read folders in diffusers' layout and single files (LDM, sgm) by this module. Only the UNet and
the text encoders matter, for no LoRA changes anything else; nothing is computed with them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_open_clip_checkpoint,
)
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from sdlora.common.families import Family
from sdlora.errors import BaseModelError, DataError
from sdlora.lora.inject import NETWORKS, LoraState, adaptable, network_of
from sdlora.lora.quantize import frozen_weight
from sdlora.lora_files.names import kohya_name
from sdlora.lora_files.read import family_of
from sdlora.models.architectures import ARCHITECTURES, TEXT_ENCODERS, Architecture, Header, read_header
from sdlora.models.base import BaseModel
from sdlora.models.families import CLASSES, family_on_disk, identify_base, is_transformer
from sdlora.models.network_file import bare_names, converter, diffusers_names, empty_network

Shape = tuple[int, ...]
# More than any tensor has rows.
_ROWS = 1 << 32


@dataclass(frozen=True)
class Place:
    """Where a weight of a network lies on the disk."""

    file: Path
    key: str  # name of the tensor in the safetensors file
    shape: Shape  # shape of the weight in diffusers' network
    pieces: tuple[tuple[int, int], ...] | None = None  # first row and first row behind, in the weight's order; or all
    transposed: bool = False  # whether the weight is stored transposed

    def load(self, read: Callable[[Path, str], Tensor]) -> Tensor:
        """The weight in float32, by a function that reads a tensor of a file."""
        tensor = read(self.file, self.key)
        own = tensor if self.pieces is None else torch.cat([tensor[first:stop] for first, stop in self.pieces])
        return (own.T if self.transposed else own).float()

    def add(self, tensor: Tensor, update: Tensor) -> None:
        """Add an update of the weight to the tensor, in place."""
        own, start = update.float().reshape(self.shape), 0
        own = own.T if self.transposed else own
        for first, stop in self.pieces or ((0, len(tensor)),):
            tensor[first:stop] += own[start : start + stop - first]
            start += stop - first


@dataclass(frozen=True)
class BaseWeights:
    """Where all weights of a base's UNet and text encoders lie."""

    path: Path  # the folder or the file
    places: Mapping[str, Sequence[Place]]  # by NETWORK.PATH.weight or .bias; several if a folder has variants
    layers: Mapping[str, str]  # the layers that a LoRA can be on: kohya module name to name in `places`


def base_weights(path: Path) -> BaseWeights:
    """Where the weights of a base lie: a folder in diffusers' layout, or a single-file checkpoint.

    Raises:
        BaseModelError: It is neither, or incomplete, or its weights are not .safetensors files.
    """
    if path.is_dir():
        return _folder_weights(path)
    if not path.is_file():
        raise BaseModelError(
            f"The base model {path} does not exist. Give a folder in diffusers' layout or a .safetensors checkpoint."
        )
    header = read_header(path)
    found = identify_base(header, path.name)
    if is_transformer(found):
        return _transformer_weights(path, header, CLASSES[found.family], found.architecture)
    return file_weights(path, header, found.family, found.architecture)


def _transformer_weights(file: Path, header: Header, kind: type[BaseModel], architecture: Architecture) -> BaseWeights:
    """Where the weights of a transformer alone in one file lie; see `file_weights`."""
    if coarse := next(
        (key for key, dtype in header.dtypes.items() if dtype not in ("F64", "F32", "F16", "BF16")), None
    ):
        raise BaseModelError(
            f"{file.name} stores {coarse!r} as {header.dtypes[coarse]}, which is too coarse for a LoRA's update. Use "
            "the base model in float16, bfloat16 or float32."
        )
    network = empty_network(kind.network_class, architecture.unet)
    names = {bare: key for key, bare in bare_names(header).items()}
    numbered = _numbered({bare: header.shapes[key] for bare, key in names.items()})
    expected = network.state_dict()
    converted = diffusers_names(converter(kind.network_class, network.config), numbered, expected, file.name)
    return BaseWeights(
        file, _places(file, header, list(names.values()), {"unet": network}, {"unet": converted}, architecture.title),
        _weight_names({"unet": network}),
    )  # fmt: skip


def _folder_weights(base: Path) -> BaseWeights:
    places: dict[str, list[Place]] = {}
    for file, network in _weight_files(base).items():
        header = read_header(file)
        for key, shape in header.shapes.items():
            if header.dtypes[key].startswith(("I", "U", "BOOL")):
                continue  # position_ids, which only old files have
            # From transformers 5 on, CLIP's weights are no longer inside one named text_model.
            name = f"{network}.{key.removeprefix('text_model.')}"
            places.setdefault(name, []).append(Place(file, key, shape))
    layers = _weight_names(empty_networks(base))
    return BaseWeights(base, places, {layer: name for layer, name in layers.items() if name in places})


def _weight_files(base: Path) -> dict[Path, str]:
    """The safetensors files of a base's UNet and text encoders, with their network's name."""
    if not (base / "model_index.json").is_file():
        raise BaseModelError(f"{base} has no model_index.json. Give a base model folder in diffusers' layout.")
    files: dict[Path, str] = {}
    for network, folder in _parts(base).items():
        found = sorted(folder.glob("*.safetensors"))
        other = sorted(file.name for ending in ("bin", "ckpt", "msgpack", "h5") for file in folder.glob(f"*.{ending}"))
        if other:
            raise BaseModelError(
                f"{folder / other[0]} is not .safetensors. Save the base model with safetensors alone."
            )
        if folder.is_dir() and not found:
            raise BaseModelError(f"{folder} contains no .safetensors file. Download or copy the base model again.")
        files |= dict.fromkeys(found, network)
    return files


def _transformer(base: Path) -> type[BaseModel] | None:
    """The class of a base model that is a transformer; None of one with a UNet, and of what is no folder."""
    family = family_on_disk(str(base)) if base.is_dir() else None
    return None if family is None or CLASSES[family].network_name == "unet" else CLASSES[family]


def _parts(base: Path) -> dict[str, Path]:
    """The folders of the networks that LoRAs are on, by the networks' names; a transformer is called as a UNet is."""
    if (kind := _transformer(base)) is not None:
        return {"unet": base / kind.network_name}
    return {network: base / network for network in NETWORKS}


def file_weights(file: Path, header: Header, family: Family, architecture: Architecture) -> BaseWeights:
    """Where the weights of a single-file checkpoint lie.

    The map comes from diffusers' own conversion: it is given, for every tensor, one column of numbers that identify
    the tensor's rows, and where those come out is the map. No weights are read.

    Raises:
        BaseModelError: Weights of its family's networks are missing or have other shapes.
    """
    networks = empty_networks(None, architecture)
    converted = _converted(header, family, networks)
    places = _places(file, header, list(header.shapes), networks, converted, architecture.title)
    return BaseWeights(file, places, _weight_names(networks))


def _places(
    file: Path,
    header: Header,
    keys: Sequence[str],
    networks: Mapping[str, nn.Module],
    converted: Mapping[str, Mapping[str, Tensor]],
    title: str,
) -> dict[str, list[Place]]:
    """Where the networks' weights lie, by where a conversion has put the numbered rows of the tensors `keys`."""
    places: dict[str, list[Place]] = {}
    for network, module in networks.items():
        for path, weight in module.state_dict().items():
            path = path.removeprefix("text_model.")
            rows = converted[network].get(path)
            if rows is None:
                raise BaseModelError(
                    f"{file.name} has no weight {path!r}, which the {network} of {title} needs. If it is a smaller "
                    "variant of its family, give a folder in diffusers' layout, with its configs."
                )
            place = _place(file, header, keys, rows)
            if place.shape != tuple(weight.shape):
                raise BaseModelError(
                    f"{file.name}: {place.key!r} has the shape {header.shapes[place.key]}, which makes a weight of "
                    f"{place.shape}; {title} needs {tuple(weight.shape)}."
                )
            places[f"{network}.{path}"] = [place]
    return places


def _numbered(shapes: Mapping[str, Shape]) -> dict[str, Tensor]:
    """A column of numbers, or as many of them, in the place of every tensor: which tensor's, and which row's."""
    numbered: dict[str, Tensor] = {}
    for index, (key, shape) in enumerate(shapes.items()):
        rows = index * _ROWS + torch.arange(shape[0] if shape else 1)
        numbered[key] = rows[:, None] if len(shape) > 1 else rows
    return numbered


def _converted(header: Header, family: Family, networks: dict[str, nn.Module]) -> dict[str, dict[str, Tensor]]:
    """Where diffusers' conversion puts the numbered rows, (rows, 1) or (rows,), by network and path."""
    numbered = _numbered(header.shapes)
    unet: Any = networks["unet"]
    found = {"unet": convert_ldm_unet_checkpoint(numbered, config=dict(unet.config))}
    for network, beginning in zip(NETWORKS[1:], TEXT_ENCODERS[family], strict=False):
        if beginning.endswith(".model."):
            found[network] = convert_open_clip_checkpoint(networks[network], numbered, prefix=beginning)
        else:
            found[network] = convert_ldm_clip_checkpoint(numbered)
    return {
        network: {path.removeprefix("text_model."): rows for path, rows in state.items()}
        for network, state in found.items()
    }


def _place(file: Path, header: Header, keys: Sequence[str], rows: Tensor) -> Place:
    flat = rows.flatten()
    key = keys[int(flat[0]) // _ROWS]
    assert len(torch.unique(flat // _ROWS)) == 1, "diffusers' conversion joins tensors"
    bounds = [0, *(torch.nonzero(flat.diff() != 1).flatten() + 1).tolist(), len(flat)]
    numbers = (flat % _ROWS).tolist()
    pieces = tuple((numbers[first], numbers[stop - 1] + 1) for first, stop in pairwise(bounds))
    shape = header.shapes[key]
    transposed = rows.dim() == 2 and rows.shape[1] > 1
    own = (len(flat), *shape[1:])
    whole = pieces == ((0, shape[0] if shape else 1),)
    return Place(file, key, own[::-1] if transposed else own, None if whole else pieces, transposed)


def empty_networks(base: Path | None, architecture: Architecture = ARCHITECTURES["sd1"]) -> dict[str, nn.Module]:
    """A base's UNet, or its transformer in the UNet's place, and CLIP text encoders by name, on the meta device.

    Args:
        base: A folder in diffusers' layout, of which only the configs are read, or None.
        architecture: The family to build if there is no base.

    Raises:
        BaseModelError: The folder does not exist, or its configs are not those of a UNet and CLIP text encoders.
    """
    configs: list[Any] = [architecture.unet, *architecture.text_encoders, None][:3]
    if base is not None and (kind := _transformer(base)) is not None:
        return {"unet": _empty_transformer(kind, base / kind.network_name / "config.json")}
    if base is not None:
        configs = [_config(base / network / "config.json") for network in NETWORKS]
    unet_config, text_config, second_config = configs
    if unet_config is None:
        raise BaseModelError(f"{base} has no unet/config.json. Give a base model folder in diffusers' layout.")
    try:
        with torch.device("meta"):
            unet = UNet2DConditionModel.from_config(unet_config)
            text = None if text_config is None else CLIPTextModel(CLIPTextConfig(**text_config))
            second = None if second_config is None else CLIPTextModelWithProjection(CLIPTextConfig(**second_config))
    except (TypeError, ValueError, KeyError) as error:
        raise BaseModelError(
            f"cannot build a UNet with CLIP text encoders from the configs in {base}: {error}"
        ) from error
    networks = zip(NETWORKS, (unet, text, second), strict=True)
    return {name: network for name, network in networks if network is not None}


def _empty_transformer(kind: type[BaseModel], file: Path) -> nn.Module:
    try:
        with torch.device("meta"):
            network: nn.Module = getattr(diffusers, kind.network_class).from_config(_config(file))
    except (TypeError, ValueError, KeyError) as error:
        raise BaseModelError(f"cannot build a {kind.network_class} from {file}: {error}") from error
    return network


def _config(file: Path) -> Any:
    """A network's configuration; None without a file."""
    try:
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    except ValueError as error:
        raise BaseModelError(f"{file} is not valid JSON: {error}.") from error


def layers_by_name(networks: Mapping[str, nn.Module]) -> dict[str, tuple[str, Shape]]:
    """The linear and convolution layers of networks: kohya module name to module path and weight shape.

    Args:
        networks: By their names in `NETWORKS`.
    """
    found: dict[str, tuple[str, Shape]] = {}
    for network, module in networks.items():
        prefix = "" if network == "unet" else f"{network}."
        for path in adaptable(module):
            name = kohya_name(prefix + path, two_text_encoders="text_encoder_2" in networks)
            found[name] = (prefix + path, tuple(frozen_weight(module.get_submodule(path)).shape))
    return found


def _weight_names(networks: Mapping[str, nn.Module]) -> dict[str, str]:
    """The layers of networks: kohya module name to the weight's name in `BaseWeights.places`."""
    found = {}
    for layer, (path, _) in layers_by_name(networks).items():
        network = network_of(path)
        found[layer] = f"{network}.{path.removeprefix(f'{network}.').removeprefix('text_model.')}.weight"
    return found


def check_fit(
    state: LoraState, layers: Iterable[tuple[str, Shape]], *, base: str, file: str = "The LoRA", hint: str = ""
) -> None:
    """Refuse a LoRA that does not fit a base's layers.

    Args:
        state: Weights by kohya module name.
        layers: Kohya module names and weight shapes of the base's layers; a name may occur several times.
        base, file, hint: For the message: the base, the LoRA, and what to do about it.

    Raises:
        DataError: A module is not among the layers, or its update has another shape.
    """
    layers = list(layers)
    known = {name for name, _ in layers}
    if missing := [name for name in state if name not in known]:
        raise DataError(
            f"{file} does not fit {base}: {len(missing)} of its {len(state)} modules are not in it, the first is "
            f"{missing[0]!r}. {hint}".rstrip()
        )
    for name, shape in layers:
        if (weights := state.get(name)) is None:
            continue
        own = (weights.up.shape[0], *weights.down.shape[1:])
        if own != shape:
            raise DataError(
                f"{file} does not fit {base}: its update of {name!r} has the shape {own}, the layer has {shape}. "
                f"{hint}".rstrip()
            )


def paths_for(state: LoraState, base: Path | None, metadata: Mapping[str, str] | None = None) -> dict[str, str]:
    """Kohya module name to module path, for every module of a LoRA; without a base, in its family as published.

    Where its modules do not tell the family, its `metadata` does.

    Raises:
        DataError: A module is not in the base, or has another shape there.
    """
    family = family_of(state, metadata)
    published = next((a for a in ARCHITECTURES.values() if a.modelspec == family), ARCHITECTURES["sd1"])
    known = layers_by_name(empty_networks(base, published))
    hint = "If its base model differs from that, give its folder: --base FOLDER." if base is None else ""
    shapes = [(name, shape) for name, (_, shape) in known.items()]
    check_fit(state, shapes, base=published.title if base is None else base.name, hint=hint)
    return {name: known[name][0] for name in state}
