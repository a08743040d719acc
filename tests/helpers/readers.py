"""Which names ComfyUI and A1111 read, written down from their documented naming rules; neither is run or copied here.

ComfyUI makes a map of every name that it reads from the checkpoint's own layers (`comfy/lora.py`): the UNet's under
both diffusers' and the authors' blocks, the text encoders' under kohya's marks. A1111 renames each name by diffusers'
blocks to the authors' (`extensions-builtin/Lora/networks.py`) and looks for that module in the checkpoint.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from sdlora.common.families import Family

ATTENTION = ("to_q", "to_k", "to_v", "to_out_0")
BLOCK = (*(f"{kind}_{name}" for kind in ("attn1", "attn2") for name in ATTENTION), "ff_net_0_proj", "ff_net_2")
RESNET = {"in_layers_2": "conv1", "emb_layers_1": "time_emb_proj", "out_layers_3": "conv2"}
SHORTCUT = ("skip_connection", "conv_shortcut")
TEXT = ("self_attn_q_proj", "self_attn_k_proj", "self_attn_v_proj", "self_attn_out_proj", "mlp_fc1", "mlp_fc2")


@dataclass(frozen=True)
class Shape:
    """What of a family's UNet and text encoders decides the names of their layers.

    Attributes:
        depths: Transformer blocks per attention, by level going down.
        widths: Channels by level.
        middle: Transformer blocks in the middle.
        text: Layers of each text encoder that a program loads.
    """

    depths: tuple[int, ...]
    widths: tuple[int, ...]
    middle: int
    text: tuple[int, ...]


SHAPES: dict[Family, Shape] = {
    "sd1": Shape((1, 1, 1, 0), (320, 640, 1280, 1280), 1, (12,)),
    "sd2": Shape((1, 1, 1, 0), (320, 640, 1280, 1280), 1, (24,)),
    "sdxl": Shape((0, 2, 10), (320, 640, 1280), 10, (12, 32)),
}


def _pairs(shape: Shape) -> Iterator[tuple[str, str]]:
    """Every layer of a UNet's blocks: its name by diffusers' blocks, and by the authors'."""
    levels, number = len(shape.depths), 1
    width = shape.widths[0]
    skips = [width]
    for level, (depth, own) in enumerate(zip(shape.depths, shape.widths, strict=True)):
        for layer in range(2):
            yield from _resnet(f"down_blocks_{level}_resnets_{layer}", f"input_blocks_{number}_0", width != own)
            yield from _transformer(f"down_blocks_{level}_attentions_{layer}", f"input_blocks_{number}_1", depth)
            width, number = own, number + 1
            skips.append(width)
        if level < levels - 1:
            yield f"down_blocks_{level}_downsamplers_0_conv", f"input_blocks_{number}_0_op"
            number += 1
            skips.append(width)
    yield from _resnet("mid_block_resnets_0", "middle_block_0", False)
    yield from _transformer("mid_block_attentions_0", "middle_block_1", shape.middle)
    yield from _resnet("mid_block_resnets_1", "middle_block_2", False)
    number = 0
    for level in range(levels):
        depth, own = shape.depths[levels - 1 - level], shape.widths[levels - 1 - level]
        for layer in range(3):
            wider = width + skips.pop() != own
            yield from _resnet(f"up_blocks_{level}_resnets_{layer}", f"output_blocks_{number}_0", wider)
            yield from _transformer(f"up_blocks_{level}_attentions_{layer}", f"output_blocks_{number}_1", depth)
            width, number = own, number + 1
        if level < levels - 1:
            place = 2 if depth else 1
            yield f"up_blocks_{level}_upsamplers_0_conv", f"output_blocks_{number - 1}_{place}_conv"


def _resnet(diffusers: str, authors: str, shortcut: bool) -> Iterator[tuple[str, str]]:
    for theirs, ours in RESNET.items():
        yield f"{diffusers}_{ours}", f"{authors}_{theirs}"
    if shortcut:
        yield f"{diffusers}_{SHORTCUT[1]}", f"{authors}_{SHORTCUT[0]}"


def _transformer(diffusers: str, authors: str, depth: int) -> Iterator[tuple[str, str]]:
    if not depth:
        return
    inside = [f"transformer_blocks_{block}_{name}" for block in range(depth) for name in BLOCK]
    for name in ("proj_in", "proj_out", *inside):
        yield f"{diffusers}_{name}", f"{authors}_{name}"


def unet_names(family: Family) -> dict[str, str]:
    """Names by the authors' blocks, to names by diffusers' blocks, both without kohya's mark."""
    return {authors: diffusers for diffusers, authors in _pairs(SHAPES[family])}


@cache
def comfyui(family: Family) -> set[str]:
    """Every module name of kohya's that ComfyUI reads for a checkpoint of a family."""
    found = {f"lora_unet_{name}" for pair in _pairs(SHAPES[family]) for name in pair}
    first, *second = SHAPES[family].text
    for marks, layers in ((("lora_te_", "lora_te1_"), first), *((("lora_te2_",), n) for n in second)):
        found |= {f"{m}text_model_encoder_layers_{i}_{name}" for m in marks for i in range(layers) for name in TEXT}
    return found


@cache
def _a1111_modules(family: Family) -> set[str]:
    """The modules of a checkpoint as A1111 has them in memory, dots as underscores."""
    found = {f"diffusion_model_{authors}" for authors in unet_names(family)}
    openclip = ("attn", "attn_out_proj", "mlp_c_fc", "mlp_c_proj")
    if family == "sd2":
        found |= {f"model_transformer_resblocks_{i}_{name}" for i in range(24) for name in openclip}
    else:
        inside = "0_transformer" if family == "sdxl" else "transformer"
        found |= {f"{inside}_text_model_encoder_layers_{i}_{name}" for i in range(12) for name in TEXT}
    if family == "sdxl":
        found |= {f"1_model_transformer_resblocks_{i}_{name}" for i in range(32) for name in openclip}
    return found


def _a1111_name(name: str, family: Family) -> str:
    """A1111's name of a kohya module: diffusers' blocks become the authors', OpenCLIP's layers its own."""
    rules = {
        r"lora_unet_down_blocks_(\d+)_(resnets|attentions)_(\d+)_(.+)": lambda m: (
            f"diffusion_model_input_blocks_{1 + 3 * int(m[1]) + int(m[3])}_{int(m[2] == 'attentions')}_{_suffix(m[4])}"
        ),
        r"lora_unet_mid_block_attentions_0_(.+)": lambda m: f"diffusion_model_middle_block_1_{m[1]}",
        r"lora_unet_mid_block_resnets_(\d)_(.+)": lambda m: (
            f"diffusion_model_middle_block_{2 * int(m[1])}_{_suffix(m[2])}"
        ),
        r"lora_unet_up_blocks_(\d+)_(resnets|attentions)_(\d+)_(.+)": lambda m: (
            f"diffusion_model_output_blocks_{3 * int(m[1]) + int(m[3])}_{int(m[2] == 'attentions')}_{_suffix(m[4])}"
        ),
        r"lora_unet_down_blocks_(\d+)_downsamplers_0_conv": lambda m: (
            f"diffusion_model_input_blocks_{3 + 3 * int(m[1])}_0_op"
        ),
        r"lora_unet_up_blocks_(\d+)_upsamplers_0_conv": lambda m: (
            f"diffusion_model_output_blocks_{2 + 3 * int(m[1])}_{2 if int(m[1]) > 0 else 1}_conv"
        ),
        r"lora_te_text_model_encoder_layers_(\d+)_(.+)": lambda m: (
            f"model_transformer_resblocks_{m[1]}_{_openclip(m[2])}"
            if family == "sd2"
            else f"transformer_text_model_encoder_layers_{m[1]}_{m[2]}"
        ),
        r"lora_te1_text_model_(.+)": lambda m: f"0_transformer_text_model_{m[1]}",
        r"lora_te2_text_model_encoder_layers_(\d+)_(.+)": lambda m: (
            f"1_model_transformer_resblocks_{m[1]}_{_openclip(m[2])}"
        ),
        r"lora_unet_(input_blocks|middle_block|output_blocks)_(.+)": lambda m: f"diffusion_model_{m[1]}_{m[2]}",
    }
    for pattern, renamed in rules.items():
        if match := re.fullmatch(pattern, name):
            return renamed(match)
    return name


def _suffix(name: str) -> str:
    return {ours: theirs for theirs, ours in (RESNET | dict([SHORTCUT])).items()}.get(name, name)


def _openclip(name: str) -> str:
    return {"mlp_fc1": "mlp_c_fc", "mlp_fc2": "mlp_c_proj"}.get(name, name.replace("self_attn", "attn"))


def a1111_reads(name: str, family: Family) -> bool:
    """Whether A1111 finds a module of kohya's name in a checkpoint of a family."""
    modules, own = _a1111_modules(family), _a1111_name(name, family)
    # OpenCLIP keeps queries, keys and values in one module; A1111 then looks for what is in front of them.
    joined = re.fullmatch(r"(.*)_[qkv]_proj", own)
    return own in modules or (joined is not None and joined[1] in modules)
