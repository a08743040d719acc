"""Transformers in their authors' layout: the reverse of what diffusers' converters do."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sdlora.models.flux2 import Flux2Klein

Tensors = dict[str, Tensor]


def z_image(state: Tensors) -> Tensors:
    """The authors' names of Z-Image's weights, queries, keys and values in one."""
    found: Tensors = {}
    for name, tensor in state.items():
        new = name.replace("all_x_embedder.2-1.", "x_embedder.").replace("all_final_layer.2-1.", "final_layer.")
        new = new.replace(".to_out.0.", ".out.").replace(".norm_q.", ".q_norm.").replace(".norm_k.", ".k_norm.")
        if ".to_q." in name:
            parts = [state[name.replace(".to_q.", f".to_{part}.")] for part in "qkv"]
            found[new.replace(".to_q.", ".qkv.")] = torch.cat(parts)
        elif not re.search(r"\.to_[kv]\.", name):
            found[new] = tensor
    return found


def klein(state: Tensors) -> Tensors:
    """The authors' names of FLUX.2 klein's weights."""
    found: Tensors = {}
    counts = {"double_blocks": 0, "single_blocks": 0}
    for block, kind in (("transformer_blocks", "double_blocks"), ("single_transformer_blocks", "single_blocks")):
        counts[kind] = len({name.split(".")[1] for name in state if name.startswith(f"{block}.")})
    for pattern, ours in Flux2Klein.names.lora_authors.items():
        kind = next((kind for kind in counts if pattern.startswith(kind)), None)
        for number in range(counts[kind]) if kind else [0]:
            theirs = pattern.replace(r"(\d+)", str(number)).replace("\\", "")
            paths = [path.replace(r"\1", str(number)) for path in ours]
            found[f"{theirs}.weight"] = torch.cat([state[f"{path}.weight"] for path in paths])
    for name, tensor in state.items():
        if match := re.fullmatch(r"(single_)?transformer_blocks\.(\d+)\.attn\.norm_(added_)?([qk])\.weight", name):
            single, number, added, letter = match.groups()
            block = f"single_blocks.{number}" if single else f"double_blocks.{number}.{'txt' if added else 'img'}_attn"
            found[f"{block}.norm.{'query' if letter == 'q' else 'key'}_norm.scale"] = tensor
    scale, shift = state["norm_out.linear.weight"].chunk(2)
    found["final_layer.adaLN_modulation.1.weight"] = torch.cat([shift, scale])
    return found


def weights_of(folder: Path) -> Tensors:
    """The weights of a folder's transformer."""
    return load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")


def in_fp8(state: Tensors, *, by_row: bool = False, newer: bool = False) -> Tensors:
    """The linear layers of blocks in e4m3 with their scales, as ComfyUI's files have them; all else in bfloat16."""
    found: Tensors = {}
    for name, tensor in state.items():
        if tensor.dim() != 2 or "layers." not in name or not name.endswith(".weight"):
            found[name] = tensor.bfloat16()
            continue
        largest = tensor.abs().amax(dim=1, keepdim=True) if by_row else tensor.abs().max()
        scale, layer = (largest / 448).float(), name.removesuffix(".weight")
        found[name] = (tensor / scale).to(torch.float8_e4m3fn)
        found[layer + (".weight_scale" if newer else ".scale_weight")] = scale
        if newer:
            found[f"{layer}.comfy_quant"] = torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
    if not newer:
        found["scaled_fp8"] = torch.empty(0).to(torch.float8_e4m3fn)
    return found


def write(file: Path, state: Tensors, *, prefix: str = "", metadata: dict[str, str] | None = None) -> Path:
    """Save weights with a prefix before their names."""
    save_file({prefix + name: tensor.contiguous() for name, tensor in state.items()}, file, metadata=metadata)
    return file
