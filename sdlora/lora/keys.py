"""Names of LoRA tensors in files.

Floor 2. kohya's names are the only ones that diffusers, ComfyUI, A1111 and Forge all read, provided that every module
brings its alpha. DoRA has PEFT's names, since diffusers drops the magnitudes under kohya's.
Shapes: i in, o out, r rank, k kernel.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sdlora.errors import DataError
from sdlora.lora.inject import LoraState, LoraWeights
from sdlora.lora.targets import TEXT_ENCODER

UNET_PREFIX = "lora_unet_"
TEXT_PREFIX = "lora_te_text_model_"
PEFT_METADATA = "lora_adapter_metadata"
_PEFT_KINDS = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector.weight")


def file_form(state: LoraState) -> LoraState:
    """The same update as plain LoRA that every program computes alike.

    A frozen start becomes r more ranks: A = [A; A0], B = [B, -B0], at the same scale. Where alphas differ inside one
    network, B takes the difference in, because diffusers reads only one alpha for all attention layers.

    Returns:
        Weights without a start, with one alpha per network.
    """
    plain = {path: _without_start(weights) for path, weights in state.items()}
    common: dict[bool, float] = {}
    for text in (False, True):
        alphas = Counter(w.alpha for path, w in plain.items() if path.startswith(TEXT_ENCODER) == text)
        common[text] = alphas.most_common(1)[0][0] if alphas else 0.0
    form: LoraState = {}
    for path, weights in plain.items():
        alpha = common[path.startswith(TEXT_ENCODER)]
        same = weights.alpha == alpha
        form[path] = weights if same else replace(weights, up=weights.up * (weights.alpha / alpha), alpha=alpha)
    return form


def _without_start(weights: LoraWeights) -> LoraWeights:
    if weights.start is None:
        return weights
    down, up = weights.start
    return LoraWeights(torch.cat([weights.down, down]), torch.cat([weights.up, -up], dim=1), 2 * weights.alpha)


def kohya_name(path: str) -> str:
    """A module path in kohya's spelling: dots become underscores."""
    if path.startswith(TEXT_ENCODER):
        # From transformers 5 on, CLIP's modules are no longer inside one named text_model; in files they still are.
        return TEXT_PREFIX + path.removeprefix(TEXT_ENCODER).removeprefix("text_model.").replace(".", "_")
    return UNET_PREFIX + path.replace(".", "_")


def to_kohya(state: LoraState) -> dict[str, Tensor]:
    """Weights under kohya's names.

    Returns:
        NAME.lora_down.weight (r, i) or (r, i, k, k), NAME.lora_up.weight (o, r) or (o, r, 1, 1) and NAME.alpha (a
        float32 scalar) per module.
    """
    tensors: dict[str, Tensor] = {}
    for path, weights in state.items():
        assert weights.start is None and weights.magnitude is None, "kohya's names hold plain LoRA alone"
        name = kohya_name(path)
        tensors[f"{name}.lora_down.weight"] = weights.down.contiguous()
        tensors[f"{name}.lora_up.weight"] = weights.up.contiguous()
        tensors[f"{name}.alpha"] = torch.tensor(weights.alpha, dtype=torch.float32)
    return tensors


def from_kohya(tensors: Mapping[str, Tensor]) -> LoraState:
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
        if part["alpha"].numel() != 1:
            raise DataError(f"The shapes of {name!r} do not pair: alpha has {part['alpha'].numel()} numbers.")
        state[name] = _paired(name, part["lora_down.weight"], part["lora_up.weight"], float(part["alpha"]))
    return state


def _paired(name: str, down: Tensor, up: Tensor, alpha: float) -> LoraWeights:
    kernels_fit = down.dim() == up.dim() and down.dim() in (2, 4) and all(size == 1 for size in up.shape[2:])
    if not kernels_fit or down.shape[0] != up.shape[1]:
        raise DataError(f"The shapes of {name!r} do not pair: down {tuple(down.shape)}, up {tuple(up.shape)}.")
    return LoraWeights(down.float(), up.float(), alpha)


def to_peft(state: LoraState) -> tuple[dict[str, Tensor], str]:
    """Weights under PEFT's names, and the JSON that diffusers needs beside them.

    Returns:
        unet.PATH.lora_A.weight, .lora_B.weight and .lora_magnitude_vector per module, likewise for the text encoder;
        and the value of `PEFT_METADATA`.
    """
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, Any] = {}
    for network in ("unet", "text_encoder"):
        part = {p: w for p, w in state.items() if p.startswith(TEXT_ENCODER) == (network == "text_encoder")}
        if not part:
            continue
        names = {path: path.removeprefix(TEXT_ENCODER) for path in part}
        ranks = {names[path]: weights.down.shape[0] for path, weights in part.items()}
        rank = Counter(ranks.values()).most_common(1)[0][0]
        (alpha,) = {weights.alpha for weights in part.values()}
        settings = {
            "r": rank,
            "lora_alpha": alpha,
            "target_modules": list(names.values()),
            "use_dora": any(weights.magnitude is not None for weights in part.values()),
            "rank_pattern": {name: r for name, r in ranks.items() if r != rank},
        }
        metadata |= {f"{network}.{key}": value for key, value in settings.items()}
        for path, weights in part.items():
            kinds = zip(_PEFT_KINDS, (weights.down, weights.up, weights.magnitude), strict=True)
            tensors |= {f"{network}.{names[path]}.{kind}": t.contiguous() for kind, t in kinds if t is not None}
    return tensors, json.dumps(metadata)


def from_peft(tensors: Mapping[str, Tensor], metadata: str) -> LoraState:
    """Weights by kohya module name, out of a file that `to_peft` wrote.

    Raises:
        DataError: A tensor has another name, a module is not whole, or the metadata is not `to_peft`'s.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        kind = next((kind for kind in _PEFT_KINDS if key.endswith(f".{kind}")), None)
        if kind is None or not key.startswith(("unet.", TEXT_ENCODER)):
            raise DataError(f"The tensor {key!r} is not one of PEFT's LoRA names.")
        parts.setdefault(key.removesuffix(f".{kind}").removeprefix("unet."), {})[kind] = tensor
    state: LoraState = {}
    for path, part in parts.items():
        missing = {"lora_A.weight", "lora_B.weight"} - part.keys()
        if missing:
            raise DataError(f"The module {path!r} lacks {', '.join(sorted(missing))}.")
        alpha = _peft_alpha(metadata, "text_encoder" if path.startswith(TEXT_ENCODER) else "unet")
        weights = _paired(path, part["lora_A.weight"], part["lora_B.weight"], alpha)
        state[kohya_name(path)] = replace(weights, magnitude=part.get("lora_magnitude_vector.weight"))
    return state


def _peft_alpha(metadata: str, network: str) -> float:
    try:
        return float(json.loads(metadata)[f"{network}.lora_alpha"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"The file's {PEFT_METADATA} does not tell the alpha of {network!r}.") from error


def with_paths(state: LoraState, paths: Iterable[str]) -> LoraState:
    """Exchange kohya module names for the paths of a base that has them.

    Raises:
        DataError: A module of the file is not in the base.
    """
    known = {kohya_name(path): path for path in paths}
    unknown = [name for name in state if name not in known]
    if unknown:
        raise DataError(f"{len(unknown)} modules are not in this base, the first is {unknown[0]!r}.")
    return {known[name]: weights for name, weights in state.items()}
