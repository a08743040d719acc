"""Names of LoRA tensors in files: kohya's and PEFT's, and the form of the weights that every program reads alike.

Used by the reader and the writer. Kohya's names are the only ones that diffusers, ComfyUI, A1111 and Forge all read,
provided that every module has its alpha. A DoRA's magnitudes are LyCORIS' `dora_scale` under them, which diffusers
drops; under PEFT's names it reads them.
A UNet's layer has two of them: by its authors' blocks (`input_blocks_4_1_…`) and by diffusers' (`down_blocks_1_…`).
The reader turns the first into the second; the writer uses the first for Stable Diffusion XL, as sd-scripts does,
because A1111 converts the second by a rule for 1.x, whose first upsampler has another place.
Shapes: i in, o out, r rank, k kernel.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sdlora.errors import DataError
from sdlora.lora.inject import NETWORKS, TARGETS, LoraState, LoraWeights, network_of
from sdlora.models.architectures import FamilyNames

UNET_PREFIX = "lora_unet_"
PEFT_METADATA = "lora_adapter_metadata"
_PEFT_KINDS = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector.weight")
# Authors' names to diffusers', each: whole layers, blocks, and what follows a resnet's block.
_LAYERS = {
    "input_blocks_0_0": "conv_in",
    "out_2": "conv_out",
    "time_embed_0": "time_embedding_linear_1",
    "time_embed_2": "time_embedding_linear_2",
    "label_emb_0_0": "add_embedding_linear_1",
    "label_emb_0_2": "add_embedding_linear_2",
}
_BLOCKS = {
    "middle_block_0": "mid_block_resnets_0",
    "middle_block_1": "mid_block_attentions_0",
    "middle_block_2": "mid_block_resnets_1",
}
_ENDINGS = {
    "in_layers_2": "conv1",
    "out_layers_3": "conv2",
    "skip_connection": "conv_shortcut",
    "emb_layers_1": "time_emb_proj",
}
# All families have two resnets per level on the way down and three on the way up: a block's number gives its level.
for _level in range(4):
    # Block 0 on the way down is conv_in, and every third one is a downsampler.
    _LAYERS[f"input_blocks_{3 * _level + 3}_0_op"] = f"down_blocks_{_level}_downsamplers_0_conv"
    # The upsampler comes after an attention if there is one, as on both levels of Stable Diffusion XL.
    for _place in (1, 2):
        _LAYERS[f"output_blocks_{3 * _level + 2}_{_place}_conv"] = f"up_blocks_{_level}_upsamplers_0_conv"
    for _place, _kind in enumerate(("resnets", "attentions")):
        for _layer in range(2):
            _BLOCKS[f"input_blocks_{3 * _level + _layer + 1}_{_place}"] = f"down_blocks_{_level}_{_kind}_{_layer}"
        for _layer in range(3):
            _BLOCKS[f"output_blocks_{3 * _level + _layer}_{_place}"] = f"up_blocks_{_level}_{_kind}_{_layer}"


def portable_state(state: LoraState) -> LoraState:
    """The same update as plain LoRA that every program computes alike.

    Frozen initial factors become r more ranks: A = [A; A0], B = [B, -B0], at the same scale. Where alphas differ
    inside one network, B absorbs the difference, because diffusers reads only one alpha for all attention layers.

    Returns:
        Weights without initial factors, with one alpha per network.
    """
    portable: LoraState = {}
    for path, w in state.items():
        portable[path] = w
        if w.initial is not None:
            down, up = w.initial
            portable[path] = LoraWeights(torch.cat([w.down, down]), torch.cat([w.up, -up], dim=1), 2 * w.alpha)
    for network in NETWORKS:
        own = {path: weights for path, weights in portable.items() if network_of(path) == network}
        alphas = Counter(weights.alpha for weights in own.values())
        for path, w in own.items():
            if w.alpha != (alpha := alphas.most_common(1)[0][0]):
                portable[path] = replace(w, up=w.up * (w.alpha / alpha), alpha=alpha)
    return portable


def as_written(state: LoraState, family: FamilyNames) -> LoraState:
    """A trained adapter's weights in the form in which a family's files have them."""
    portable = portable_state(state)
    return portable if family.lora_prefix is None else folded(portable)


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


def kohya_target(name: str) -> str | None:
    """The name of the target that a kohya module name belongs to, or None; see `sdlora.lora.inject.target_of`."""
    path = re.sub(r"^lora_te\d?_", "text_encoder_", name.removeprefix(UNET_PREFIX))
    patterns = {target: pattern.pattern.replace(r"\.", "_") for target, pattern in TARGETS.items()}
    return next((target for target, pattern in patterns.items() if re.fullmatch(pattern, path)), None)


def to_kohya(state: LoraState, *, two_text_encoders: bool = False) -> dict[str, Tensor]:
    """Weights by module path as the tensors of a file under kohya's names; see `kohya_tensors`."""
    named = {kohya_name(path, two_text_encoders=two_text_encoders): weights for path, weights in state.items()}
    return kohya_tensors(named, authors_blocks=two_text_encoders)


def kohya_tensors(state: LoraState, *, authors_blocks: bool = False) -> dict[str, Tensor]:
    """LoRA or DoRA by kohya module name as the tensors of a file.

    Args:
        authors_blocks: Name the UNet's layers by its authors' blocks, as for Stable Diffusion XL.

    Returns:
        NAME.lora_down.weight (r, i) or (r, i, k, k), NAME.lora_up.weight (o, r) or (o, r, 1, 1) and NAME.alpha (a
        float32 scalar) per module; of a DoRA also NAME.dora_scale (o, 1) or (o, 1, 1, 1), whose axis says that
        magnitudes are the outputs'.
    """
    tensors: dict[str, Tensor] = {}
    for known, weights in state.items():
        assert weights.initial is None, "kohya's names hold no initial factors"
        name = authors_name(known) if authors_blocks else known
        tensors[f"{name}.lora_down.weight"] = weights.down.contiguous()
        tensors[f"{name}.lora_up.weight"] = weights.up.contiguous()
        tensors[f"{name}.alpha"] = torch.tensor(weights.alpha, dtype=torch.float32)
        if weights.magnitude is not None:
            shape = (-1, *(1 for _ in weights.down.shape[1:]))
            tensors[f"{name}.dora_scale"] = weights.magnitude.reshape(shape).contiguous()
    return tensors


def folded(state: LoraState) -> LoraState:
    """The same update with alpha / r inside B, so that alpha is the rank."""
    return {
        path: replace(w, up=w.up * (w.alpha / (rank := w.down.shape[0])), alpha=float(rank))
        for path, w in state.items()
    }


def to_transformer(state: LoraState, prefix: str) -> dict[str, Tensor]:
    """Folded weights by module path as the tensors of a transformer's file, in which no alpha is needed.

    Returns:
        PREFIX PATH .lora_A.weight, .lora_B.weight and, of DoRA, .lora_magnitude_vector.weight per module.
    """
    tensors: dict[str, Tensor] = {}
    for path, weights in state.items():
        assert weights.alpha == weights.down.shape[0], "alpha / r is in B"
        kinds = zip(_PEFT_KINDS, (weights.down, weights.up, weights.magnitude), strict=True)
        tensors |= {f"{prefix}{path}.{kind}": tensor.contiguous() for kind, tensor in kinds if tensor is not None}
    return tensors


def transformer_path(name: str, family: FamilyNames) -> str:
    """The module path of a transformer's layer by its kohya module name, whose underscores are dots or parts of words.

    Raises:
        DataError: The name is not of the family.
    """
    inside = name.removeprefix(UNET_PREFIX)
    parts = re.findall(family.lora_parts, inside)
    if "_".join(parts) != inside:
        raise DataError(f"{name!r} is no layer of {family.title} that sdlora knows.")
    return ".".join(parts)


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


def diffusers_name(name: str) -> str:
    """A kohya module name by diffusers' blocks; a name without the authors' blocks stays as it is."""
    return _renamed(name, _LAYERS, _BLOCKS, _ENDINGS)


def authors_name(name: str) -> str:
    """The reverse of `diffusers_name`, for Stable Diffusion XL; text encoders' names stay as they are."""
    return _renamed(name, *({ours: theirs for theirs, ours in names.items()} for names in (_LAYERS, _BLOCKS, _ENDINGS)))


def _renamed(name: str, layers: Mapping[str, str], blocks: Mapping[str, str], endings: Mapping[str, str]) -> str:
    if not name.startswith(UNET_PREFIX):
        return name
    inside = name.removeprefix(UNET_PREFIX)
    if inside in layers:
        return UNET_PREFIX + layers[inside]
    for block, other in blocks.items():
        if inside.startswith(f"{block}_"):
            ending = inside.removeprefix(f"{block}_")
            return f"{UNET_PREFIX}{other}_{endings.get(ending, ending)}"
    return name
