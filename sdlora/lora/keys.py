"""Names of LoRA tensors in files.

Floor 2. kohya's names are the only ones that diffusers, ComfyUI, A1111 and Forge all read, provided that every module
brings its alpha. Shapes: i in, o out, r rank.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from sdlora.errors import DataError
from sdlora.lora.inject import LoraState, LoraWeights

UNET_PREFIX = "lora_unet_"


def kohya_name(path: str, prefix: str = UNET_PREFIX) -> str:
    """A module path in kohya's spelling: dots become underscores."""
    return prefix + path.replace(".", "_")


def to_kohya(state: LoraState, prefix: str = UNET_PREFIX) -> dict[str, Tensor]:
    """Weights under kohya's names.

    Returns:
        NAME.lora_down.weight (r, i), NAME.lora_up.weight (o, r) and NAME.alpha (a float32 scalar) per module.
    """
    tensors: dict[str, Tensor] = {}
    for path, weights in state.items():
        name = kohya_name(path, prefix)
        tensors[f"{name}.lora_down.weight"] = weights.down.contiguous()
        tensors[f"{name}.lora_up.weight"] = weights.up.contiguous()
        tensors[f"{name}.alpha"] = torch.tensor(weights.alpha, dtype=torch.float32)
    return tensors


def from_kohya(tensors: dict[str, Tensor]) -> LoraState:
    """Weights by kohya module name (underscores cannot be turned back into dots without the network).

    Raises:
        DataError: A tensor belongs to no known kind, or a module lacks one of its three or has shapes that do not pair.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, kind = key.partition(".")
        if kind not in ("lora_down.weight", "lora_up.weight", "alpha"):
            raise DataError(f"The tensor {key!r} is not one of kohya's LoRA names.")
        parts.setdefault(name, {})[kind] = tensor
    state: LoraState = {}
    for name, part in parts.items():
        missing = {"lora_down.weight", "lora_up.weight", "alpha"} - part.keys()
        if missing:
            raise DataError(f"The module {name!r} lacks {', '.join(sorted(missing))}.")
        down, up = part["lora_down.weight"], part["lora_up.weight"]
        if down.dim() != 2 or up.dim() != 2 or down.shape[0] != up.shape[1] or part["alpha"].numel() != 1:
            shapes = f"down {tuple(down.shape)}, up {tuple(up.shape)}"
            raise DataError(f"The shapes of {name!r} do not pair: {shapes}.")
        state[name] = LoraWeights(down.float(), up.float(), float(part["alpha"]))
    return state


def with_paths(state: LoraState, paths: Iterable[str], prefix: str = UNET_PREFIX) -> LoraState:
    """Exchange kohya module names for the paths of a network that has them.

    Raises:
        DataError: A module of the file is not in the network.
    """
    known = {kohya_name(path, prefix): path for path in paths}
    unknown = [name for name in state if name not in known]
    if unknown:
        raise DataError(f"{len(unknown)} modules are not in this base, the first is {unknown[0]!r}.")
    return {known[name]: weights for name, weights in state.items()}
