"""Names of LoRA tensors in files: kohya's and PEFT's, and the form of the weights that every program reads alike.

Used by the reader and the writer. Kohya's names are the only ones that diffusers, ComfyUI, A1111 and Forge all read,
provided that every module has its alpha. DoRA has PEFT's names, since diffusers drops the magnitudes under kohya's.
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


def portable_state(state: LoraState) -> LoraState:
    """The same update as plain LoRA that every program computes alike.

    Frozen initial factors become r more ranks: A = [A; A0], B = [B, -B0], at the same scale. Where alphas differ
    inside one network, B absorbs the difference, because diffusers reads only one alpha for all attention layers.

    Returns:
        Weights without initial factors, with one alpha per network.
    """
    plain = {path: _without_initial(weights) for path, weights in state.items()}
    portable: LoraState = {}
    for network in NETWORKS:
        own = {path: weights for path, weights in plain.items() if network_of(path) == network}
        if own:
            alpha = Counter(weights.alpha for weights in own.values()).most_common(1)[0][0]
            portable |= {path: w if w.alpha == alpha else _with_alpha(w, alpha) for path, w in own.items()}
    return {path: portable[path] for path in state}


def _without_initial(weights: LoraWeights) -> LoraWeights:
    if weights.initial is None:
        return weights
    down, up = weights.initial
    return LoraWeights(torch.cat([weights.down, down]), torch.cat([weights.up, -up], dim=1), 2 * weights.alpha)


def _with_alpha(weights: LoraWeights, alpha: float) -> LoraWeights:
    return replace(weights, up=weights.up * (weights.alpha / alpha), alpha=alpha)


def rounded(state: LoraState, dtype: torch.dtype) -> LoraState:
    """Weights as they come back from a file that stores them in a dtype; alphas stay as they are."""

    def through(tensor: Tensor) -> Tensor:
        return tensor.to(dtype).float()

    return {
        path: replace(
            weights,
            down=through(weights.down),
            up=through(weights.up),
            magnitude=None if weights.magnitude is None else through(weights.magnitude),
        )
        for path, weights in state.items()
    }


def kohya_name(path: str, *, two_text_encoders: bool = False) -> str:
    """The kohya name of a module: its path with underscores for dots, behind its network's prefix.

    Args:
        path: A module's name in the UNet, or in a text encoder behind "text_encoder." or "text_encoder_2.".
        two_text_encoders: Whether the family has two, which makes the first one's prefix "lora_te1_".
    """
    for network, prefix in (
        ("text_encoder.", "lora_te1_" if two_text_encoders else "lora_te_"),
        ("text_encoder_2.", "lora_te2_"),
    ):
        if path.startswith(network):
            name = path.removeprefix(network).removeprefix("text_model.")
            # From transformers 5 on, CLIP's modules are no longer inside one named text_model; in files they still are.
            inside = "" if name == "text_projection" else "text_model_"
            return prefix + inside + name.replace(".", "_")
    return UNET_PREFIX + path.replace(".", "_")


def to_kohya(state: LoraState, *, two_text_encoders: bool = False) -> dict[str, Tensor]:
    """Weights by module path as the tensors of a file under kohya's names; see `kohya_tensors`.

    Args:
        state: Weights by module path.
        two_text_encoders: Whether the family is Stable Diffusion XL.
    """
    named = {kohya_name(path, two_text_encoders=two_text_encoders): weights for path, weights in state.items()}
    return kohya_tensors(named, authors_blocks=two_text_encoders)


def kohya_tensors(state: LoraState, *, authors_blocks: bool = False) -> dict[str, Tensor]:
    """Weights by kohya module name as the tensors of a file.

    Args:
        state: Plain LoRA by kohya module name.
        authors_blocks: Name the UNet's layers by its authors' blocks, as for Stable Diffusion XL.

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
    """Weights by module path as the tensors of a file under PEFT's names, and the JSON that diffusers needs with them.

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
