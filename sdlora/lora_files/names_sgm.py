"""The two names of a UNet's layer: by its authors' blocks (`input_blocks_4_1_…`) and by diffusers' (`down_blocks_1_…`).

The reader turns the first into the second; the writer uses the first for Stable Diffusion XL, as sd-scripts does,
because A1111 converts the second by a rule for 1.x, whose first upsampler has another place. All families have two
resnets per level on the way down and three on the way up, so that a block's number gives its level.
"""

from __future__ import annotations

import re

_UNET = "lora_unet_"
_RESNET = {
    "in_layers_2": "conv1",
    "out_layers_3": "conv2",
    "skip_connection": "conv_shortcut",
    "emb_layers_1": "time_emb_proj",
}
_SINGLE = {
    "input_blocks_0_0": "conv_in",
    "out_2": "conv_out",
    "time_embed_0": "time_embedding_linear_1",
    "time_embed_2": "time_embedding_linear_2",
    "label_emb_0_0": "add_embedding_linear_1",
    "label_emb_0_2": "add_embedding_linear_2",
}
_BLOCK = re.compile(r"(input|output)_blocks_(\d+)_(\d)_(.+)")
_DIFFUSERS = re.compile(
    r"(down_blocks|mid_block|up_blocks)_(?:(\d+)_)?(resnets|attentions|downsamplers|upsamplers)_(\d+)_(.+)"
)
_MIDDLE = re.compile(r"middle_block_([012])_(.+)")


def diffusers_name(name: str) -> str:
    """A kohya module name by diffusers' blocks; a name without the UNet's original blocks stays as it is."""
    inside = name.removeprefix(_UNET)
    if inside == name:
        return name
    if inside in _SINGLE:
        return _UNET + _SINGLE[inside]
    if match := _MIDDLE.fullmatch(inside):
        place, rest = int(match[1]), match[2]
        kind = "attentions_0" if place == 1 else f"resnets_{place // 2}"
        return f"{_UNET}mid_block_{kind}_{_RESNET.get(rest, rest)}"
    if match := _BLOCK.fullmatch(inside):
        return _UNET + _in_a_level(match[1] == "input", int(match[2]), int(match[3]), match[4])
    return name


def _in_a_level(down: bool, number: int, place: int, rest: str) -> str:
    # Going down, block 0 is conv_in and every third one is the downsampler alone.
    level, layer = divmod(number - 1 if down else number, 3)
    blocks = f"{'down' if down else 'up'}_blocks_{level}"
    if rest == "op":
        return f"{blocks}_downsamplers_0_conv"
    if rest == "conv":
        return f"{blocks}_upsamplers_0_conv"
    if place == 0:
        return f"{blocks}_resnets_{layer}_{_RESNET.get(rest, rest)}"
    return f"{blocks}_attentions_{layer}_{rest}"


def authors_name(name: str) -> str:
    """The reverse of `diffusers_name`, for Stable Diffusion XL; text encoders' names stay as they are."""
    inside = name.removeprefix(_UNET)
    if inside == name:
        return name
    single = {diffusers: authors for authors, diffusers in _SINGLE.items()}
    if inside in single:
        return _UNET + single[inside]
    match = _DIFFUSERS.fullmatch(inside)
    if match is None:
        return name
    way, level, kind, layer, rest = match[1], int(match[2] or 0), match[3], int(match[4]), match[5]
    rest = {diffusers: authors for authors, diffusers in _RESNET.items()}.get(rest, rest)
    if way == "mid_block":
        return f"{_UNET}middle_block_{1 if kind == 'attentions' else 2 * layer}_{rest}"
    if kind == "downsamplers":
        return f"{_UNET}input_blocks_{3 * (level + 1)}_0_op"
    if kind == "upsamplers":
        # Both levels that are upsampled have attention, and the upsampler comes after it.
        return f"{_UNET}output_blocks_{3 * level + 2}_2_conv"
    block = f"input_blocks_{3 * level + layer + 1}" if way == "down_blocks" else f"output_blocks_{3 * level + layer}"
    return f"{_UNET}{block}_{int(kind == 'attentions')}_{rest}"
