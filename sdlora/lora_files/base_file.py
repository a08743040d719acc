"""Where the weights of a single-file checkpoint (LDM, sgm) lie: which of its tensors are which of diffusers' weights.

The map comes from diffusers' own conversion: it is given, for every tensor, one column of numbers that identify the
tensor's rows, and where those come out is the map. No weights are read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_open_clip_checkpoint,
)
from torch import Tensor, nn

from sdlora.errors import BaseModelError
from sdlora.lora_files.base_folder import BaseWeights, Place, empty_networks, folder_weights, weight_names
from sdlora.models.architectures import ARCHITECTURES, Family
from sdlora.models.detect import TEXT_ENCODERS, identify
from sdlora.models.safetensors_header import Header, read_header

# More than any tensor has rows.
_ROWS = 1 << 32


def base_weights(path: Path) -> BaseWeights:
    """Where the weights of a base lie: a folder in diffusers' layout, or a single-file checkpoint.

    Raises:
        BaseModelError: It is neither, or incomplete.
    """
    if path.is_dir():
        return folder_weights(path)
    if not path.is_file():
        raise BaseModelError(
            f"The base model {path} does not exist. Give a folder in diffusers' layout or a .safetensors checkpoint."
        )
    header = read_header(path)
    return file_weights(path, header, identify(header, path.name).family)


def file_weights(file: Path, header: Header, family: Family) -> BaseWeights:
    """Where the weights of a single-file checkpoint lie.

    Args:
        file: The checkpoint.
        header: Its header.
        family: Its family.

    Raises:
        BaseModelError: Weights of its family's networks are missing or have other shapes.
    """
    networks = empty_networks(None, ARCHITECTURES[family])
    converted = _converted(header, family, networks)
    keys = list(header.shapes)
    places: dict[str, list[Place]] = {}
    for network, module in networks.items():
        for path, weight in module.state_dict().items():
            path = path.removeprefix("text_model.")
            rows = converted[network].get(path)
            if rows is None:
                raise BaseModelError(
                    f"{file.name} has no weight {path!r}, which the {network} of {ARCHITECTURES[family].title} needs. "
                    "If it is a smaller variant of its family, give a folder in diffusers' layout, with its configs."
                )
            place = _place(file, header, keys, rows)
            if place.shape != tuple(weight.shape):
                raise BaseModelError(
                    f"{file.name}: {place.key!r} has the shape {header.shapes[place.key]}, which makes a weight of "
                    f"{place.shape}; {ARCHITECTURES[family].title} needs {tuple(weight.shape)}."
                )
            places[f"{network}.{path}"] = [place]
    return BaseWeights(file, places, weight_names(networks))


def _converted(header: Header, family: Family, networks: dict[str, nn.Module]) -> dict[str, dict[str, Tensor]]:
    """Where diffusers' conversion puts the numbered rows, by network and path."""
    numbered = {key: _numbered(index, shape) for index, (key, shape) in enumerate(header.shapes.items())}
    unet: Any = networks["unet"]
    found = {"unet": convert_ldm_unet_checkpoint(numbered, config=dict(unet.config))}
    for network, beginning in zip(("text_encoder", "text_encoder_2"), TEXT_ENCODERS[family], strict=False):
        if beginning.endswith(".model."):
            found[network] = convert_open_clip_checkpoint(networks[network], numbered, prefix=beginning)
        else:
            found[network] = convert_ldm_clip_checkpoint(numbered)
    return {
        network: {path.removeprefix("text_model."): rows for path, rows in state.items()}
        for network, state in found.items()
    }


def _numbered(index: int, shape: tuple[int, ...]) -> Tensor:
    """The numbers of a tensor's rows: (rows, 1), or (rows,) for a vector."""
    rows = index * _ROWS + torch.arange(shape[0] if shape else 1)
    return rows[:, None] if len(shape) > 1 else rows


def _place(file: Path, header: Header, keys: list[str], rows: Tensor) -> Place:
    first, last = int(rows.flatten()[0]), int(rows.flatten()[-1])
    key, start, stop = keys[first // _ROWS], first % _ROWS, last % _ROWS + 1
    assert torch.equal(rows.flatten(), torch.arange(first, last + 1)), "diffusers' conversion changed the order of rows"
    shape = header.shapes[key]
    whole = stop - start == shape[0]
    transposed = rows.dim() == 2 and rows.shape[1] > 1
    own = (stop - start, *shape[1:])
    return Place(file, key, own[::-1] if transposed else own, None if whole else (start, stop), transposed)
