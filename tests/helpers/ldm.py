"""Checkpoints in one file as their authors laid them out (LDM, sgm): the reverse of diffusers' conversion."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sdlora.common.families import Family

Tensors = dict[str, Tensor]

_UNET_SINGLE = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
}  # fmt: skip
_RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_OPENCLIP = {
    "layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}  # fmt: skip


def unet_layer(path: str, layers: int, attentive: set[int]) -> str:
    """A UNet layer's name in the authors' layout.

    Args:
        path: diffusers' name of it, without "weight" or "bias".
        layers: Resnets per level going down.
        attentive: Which levels, going up, have attention.
    """
    if path in _UNET_SINGLE:
        return _UNET_SINGLE[path]
    parts = path.split(".")
    if parts[0] == "mid_block":
        place = 1 if parts[1] == "attentions" else 2 * int(parts[2])
        return f"middle_block.{place}.{_rest(parts[1], parts[3:])}"
    level, kind, number = int(parts[1]), parts[2], int(parts[3])
    if parts[0] == "down_blocks":
        if kind == "downsamplers":
            return f"input_blocks.{(layers + 1) * (level + 1)}.0.op"
        return f"input_blocks.{1 + (layers + 1) * level + number}.{int(kind == 'attentions')}.{_rest(kind, parts[4:])}"
    block = (layers + 1) * level
    if kind == "upsamplers":
        return f"output_blocks.{block + layers}.{2 if level in attentive else 1}.conv"
    return f"output_blocks.{block + number}.{int(kind == 'attentions')}.{_rest(kind, parts[4:])}"


def _rest(kind: str, parts: list[str]) -> str:
    return _RESNET[parts[0]] if kind == "resnets" else ".".join(parts)


def _unet(unet: Any) -> Tensors:
    config = unet.config
    attentive = {level for level, kind in enumerate(config.up_block_types) if "CrossAttn" in kind}
    found: Tensors = {}
    for key, tensor in unet.state_dict().items():
        path, _, ending = key.rpartition(".")
        name = unet_layer(path, config.layers_per_block, attentive)
        found[f"model.diffusion_model.{name}.{ending}"] = tensor
    return found


def vae_layout(state: Tensors, levels: int) -> Tensors:
    """The authors' names of a VAE's weights."""
    found: Tensors = {}
    for key, tensor in state.items():
        name = key.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        name = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", name)
        name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
        name = re.sub(r"up_blocks\.(\d+)\.resnets", lambda m: f"up.{levels - 1 - int(m[1])}.block", name)
        name = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{levels - 1 - int(m[1])}.upsample", name)
        name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
        if "mid_block.attentions.0" in name:
            head, _, rest = name.partition("mid_block.attentions.0.")
            layer, _, ending = rest.rpartition(".")
            name = f"{head}mid.attn_1.{_VAE_ATTENTION[layer]}.{ending}"
            # The authors' attention is made of convolutions.
            tensor = tensor[:, :, None, None] if tensor.dim() == 2 else tensor
        found[name] = tensor
    return found


def _clip(encoder: nn.Module, prefix: str) -> Tensors:
    return {
        f"{prefix}transformer.text_model.{key.removeprefix('text_model.')}": tensor
        for key, tensor in encoder.state_dict().items()
    }


def _openclip(encoder: nn.Module, prefix: str) -> Tensors:
    state = {key.removeprefix("text_model."): tensor for key, tensor in encoder.state_dict().items()}
    single = {
        "embeddings.token_embedding.weight": "token_embedding.weight", "final_layer_norm.bias": "ln_final.bias",
        "embeddings.position_embedding.weight": "positional_embedding", "final_layer_norm.weight": "ln_final.weight",
    }  # fmt: skip
    found: Tensors = {}
    width = state["final_layer_norm.weight"].shape[0]
    # Checkpoints of 2.x hold a projection that is never used.
    found["text_projection"] = state.pop("text_projection.weight", torch.zeros(width, width)).T
    for key, tensor in state.items():
        if key in single:
            found[single[key]] = tensor
            continue
        match = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", key)
        assert match is not None, key
        block = f"transformer.resblocks.{match[1]}"
        if match[2] in _OPENCLIP:
            found[f"{block}.{_OPENCLIP[match[2]]}.{match[3]}"] = tensor
        elif match[2] == "self_attn.q_proj":
            names = [f"encoder.layers.{match[1]}.self_attn.{x}_proj.{match[3]}" for x in "qkv"]
            found[f"{block}.attn.in_proj_{match[3]}"] = torch.cat([state[name] for name in names])
    return {f"{prefix}{key}": tensor for key, tensor in found.items()}


def authors_layout(family: Family, networks: dict[str, Any]) -> Tensors:
    """All weights of a base under its authors' names."""
    vae = networks["vae"]
    tensors = _unet(networks["unet"]) | {
        f"first_stage_model.{name}": tensor
        for name, tensor in vae_layout(vae.state_dict(), len(vae.config.up_block_types)).items()
    }
    if family == "sd1":
        tensors |= _clip(networks["text_encoder"], "cond_stage_model.")
    elif family == "sd2":
        tensors |= _openclip(networks["text_encoder"], "cond_stage_model.model.")
    else:
        tensors |= _clip(networks["text_encoder"], "conditioner.embedders.0.")
        tensors |= _openclip(networks["text_encoder_2"], "conditioner.embedders.1.model.")
    return tensors


def write_checkpoint(
    file: Path, tensors: Tensors, *, dtype: torch.dtype = torch.float32, metadata: dict[str, str] | None = None
) -> None:
    """Write a checkpoint in one file."""
    save_file({key: tensor.to(dtype).contiguous() for key, tensor in tensors.items()}, file, metadata=metadata)
