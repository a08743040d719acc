"""Names of LoRA tensors in files.

Kohya's names are the only ones that diffusers, ComfyUI, A1111 and Forge all read, provided that every module
brings its alpha. DoRA has PEFT's names, since diffusers drops the magnitudes under kohya's.
Shapes: i in, o out, r rank, k kernel.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sdlora.lora.inject import LoraState, LoraWeights
from sdlora.lora.targets import NETWORKS, network_of
from sdlora.lora_files.names_sgm import authors_name

UNET_PREFIX = "lora_unet_"
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
    common: dict[str, float] = {}
    for network in NETWORKS:
        alphas = Counter(w.alpha for path, w in plain.items() if network_of(path) == network)
        common[network] = alphas.most_common(1)[0][0] if alphas else 0.0
    form: LoraState = {}
    for path, weights in plain.items():
        alpha = common[network_of(path)]
        same = weights.alpha == alpha
        form[path] = weights if same else replace(weights, up=weights.up * (weights.alpha / alpha), alpha=alpha)
    return form


def _without_start(weights: LoraWeights) -> LoraWeights:
    if weights.initial is None:
        return weights
    down, up = weights.initial
    return LoraWeights(torch.cat([weights.down, down]), torch.cat([weights.up, -up], dim=1), 2 * weights.alpha)


def rounded(state: LoraState, dtype: torch.dtype) -> LoraState:
    """Weights as they come back from a file that stores them in a type; alphas stay as they are."""
    if dtype == torch.float32:
        return state

    form: LoraState = {}
    for path, weights in state.items():
        magnitude = None if weights.magnitude is None else weights.magnitude.to(dtype).float()
        down, up = (tensor.to(dtype).float() for tensor in (weights.down, weights.up))
        form[path] = replace(weights, down=down, up=up, magnitude=magnitude)
    return form


def first_text_encoder(*, two: bool) -> str:
    """Kohya's mark for the first text encoder of a family that has one or two."""
    return "lora_te1_" if two else "lora_te_"


def kohya_name(path: str, *, first_text_encoder: str = "lora_te_") -> str:
    """A module path in kohya's spelling: dots become underscores.

    Args:
        path: A module's name in the UNet, or in a text encoder with "text_encoder." or "text_encoder_2." in front.
        first_text_encoder: "lora_te1_" where the family has two text encoders.
    """
    for prefix, mark in (("text_encoder.", first_text_encoder), ("text_encoder_2.", "lora_te2_")):
        if path.startswith(prefix):
            name = path.removeprefix(prefix).removeprefix("text_model.")
            # From transformers 5 on, CLIP's modules are no longer inside one named text_model; in files they still are.
            inside = "" if name == "text_projection" else "text_model_"
            return mark + inside + name.replace(".", "_")
    return UNET_PREFIX + path.replace(".", "_")


def to_kohya(state: LoraState, *, two_text_encoders: bool = False) -> dict[str, Tensor]:
    """Weights under kohya's names.

    Args:
        state: Weights by module path.
        two_text_encoders: Whether the family is Stable Diffusion XL.

    Returns:
        What `kohya_tensors` gives.
    """
    first = first_text_encoder(two=two_text_encoders)
    named = {kohya_name(path, first_text_encoder=first): weights for path, weights in state.items()}
    return kohya_tensors(named, authors_blocks=two_text_encoders)


def kohya_tensors(state: LoraState, *, authors_blocks: bool = False) -> dict[str, Tensor]:
    """Weights that have kohya's names already, as the tensors of a file.

    Args:
        state: Weights by kohya module name.
        authors_blocks: Whether the UNet's layers are named by its authors' blocks, as for Stable Diffusion XL.

    Returns:
        NAME.lora_down.weight (r, i) or (r, i, k, k), NAME.lora_up.weight (o, r) or (o, r, 1, 1) and NAME.alpha (a
        float32 scalar) per module.
    """
    tensors: dict[str, Tensor] = {}
    for known, weights in state.items():
        name = authors_name(known) if authors_blocks else known
        assert weights.initial is None and weights.magnitude is None, "kohya's names hold plain LoRA alone"
        tensors[f"{name}.lora_down.weight"] = weights.down.contiguous()
        tensors[f"{name}.lora_up.weight"] = weights.up.contiguous()
        tensors[f"{name}.alpha"] = torch.tensor(weights.alpha, dtype=torch.float32)
    return tensors


def to_peft(state: LoraState) -> tuple[dict[str, Tensor], str]:
    """Weights under PEFT's names, and the JSON that diffusers needs beside them.

    Returns:
        unet.PATH.lora_A.weight, .lora_B.weight and .lora_magnitude_vector per module, likewise for the text encoders;
        and the value of `PEFT_METADATA`.
    """
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, Any] = {}
    for network in NETWORKS:
        part = {path: weights for path, weights in state.items() if network_of(path) == network}
        if not part:
            continue
        names = {path: path.removeprefix(f"{network}.") for path in part}
        ranks = {names[path]: weights.down.shape[0] for path, weights in part.items()}
        alphas = {names[path]: weights.alpha for path, weights in part.items()}
        rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
        settings = {
            "r": rank,
            "lora_alpha": alpha,
            "target_modules": list(names.values()),
            "use_dora": any(weights.magnitude is not None for weights in part.values()),
            "rank_pattern": {name: r for name, r in ranks.items() if r != rank},
        }
        if other_alphas := {name: a for name, a in alphas.items() if a != alpha}:
            settings["alpha_pattern"] = other_alphas
        metadata |= {f"{network}.{key}": value for key, value in settings.items()}
        for path, weights in part.items():
            kinds = zip(_PEFT_KINDS, (weights.down, weights.up, weights.magnitude), strict=True)
            tensors |= {f"{network}.{names[path]}.{kind}": t.contiguous() for kind, t in kinds if t is not None}
    return tensors, json.dumps(metadata)
