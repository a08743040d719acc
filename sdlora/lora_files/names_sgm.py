"""The two names of a UNet's layer: by its authors' blocks (`input_blocks_4_1_…`) and by diffusers' (`down_blocks_1_…`).

The reader turns the first into the second; the writer uses the first for Stable Diffusion XL, as sd-scripts does,
because A1111 converts the second by a rule for 1.x, whose first upsampler has another place. All families have two
resnets per level on the way down and three on the way up, so that a block's number gives its level.
"""

from __future__ import annotations

from collections.abc import Mapping

_UNET = "lora_unet_"
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


def diffusers_name(name: str) -> str:
    """A kohya module name by diffusers' blocks; a name without the authors' blocks stays as it is."""
    return _renamed(name, _LAYERS, _BLOCKS, _ENDINGS)


def authors_name(name: str) -> str:
    """The reverse of `diffusers_name`, for Stable Diffusion XL; text encoders' names stay as they are."""
    return _renamed(name, *({ours: theirs for theirs, ours in names.items()} for names in (_LAYERS, _BLOCKS, _ENDINGS)))


def _renamed(name: str, layers: Mapping[str, str], blocks: Mapping[str, str], endings: Mapping[str, str]) -> str:
    if not name.startswith(_UNET):
        return name
    inside = name.removeprefix(_UNET)
    if inside in layers:
        return _UNET + layers[inside]
    for block, other in blocks.items():
        if inside.startswith(f"{block}_"):
            ending = inside.removeprefix(f"{block}_")
            return f"{_UNET}{other}_{endings.get(ending, ending)}"
    return name
