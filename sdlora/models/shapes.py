"""The shape of a checkpoint in one file, from its tensors: its levels, blocks and layers, and how wide they are.

A smaller or larger variant of a family, such as SSD-1B, is trained and checked as its family is. What shapes do not
tell is the family's: the width of a head, groups of norms, activations, resolution. Used by `architectures.identify`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

_NUM_SIZES = 6  # numbers that SDXL's time embedding takes beside the pooled text
_GROUPS = 32
_UNET_DEFAULTS: dict[str, Any] = {
    "layers_per_block": 2, "transformer_layers_per_block": 1, "use_linear_projection": False,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3, "mid_block_type": "UNetMidBlock2DCrossAttn",
}  # fmt: skip
"""diffusers' own, which the families' configurations leave out."""

Tensors = Mapping[str, tuple[int, ...]]
"""Shapes by name."""


class ShapeError(Exception):
    """Tensors that make no network of their family; says why, as the end of a sentence."""


class _Block(NamedTuple):
    """A residual block: its width, and how many transformer layers follow it."""

    width: int
    depth: int


def part(tensors: Tensors, prefix: str) -> dict[str, tuple[int, ...]]:
    """The tensors under a prefix, by the rest of their names."""
    return {name.removeprefix(prefix): shape for name, shape in tensors.items() if name.startswith(prefix)}


def unet_config(tensors: Tensors, family: Mapping[str, Any], pooled_width: int) -> dict[str, Any]:
    """The configuration of a UNet2DConditionModel.

    Args:
        tensors: In the authors' names, such as "input_blocks.0.0.weight".
        family: The family's own, where it differs from the class's defaults.
        pooled_width: Of the pooled text embedding; used by SDXL alone.

    Raises:
        ShapeError: It cannot be such a model.
    """
    levels, ups, middle = _levels(tensors), _ups(tensors), _middle(tensors)
    num_layers = len(levels[0])
    if any(len(level) != num_layers for level in levels):
        raise ShapeError(f"its levels have {' and '.join(str(len(level)) for level in levels)} blocks")
    if len(ups) != len(levels) * (num_layers + 1):
        raise ShapeError(f"it has {len(ups)} blocks going up, not {len(levels) * (num_layers + 1)}")
    ups_by_level = [ups[first : first + num_layers + 1] for first in range(0, len(ups), num_layers + 1)]
    widths = [_same([block.width for block in level], "widths in one level") for level in levels]
    depths = [[block.depth for block in level] for level in levels]
    up_depths = [[block.depth for block in level] for level in ups_by_level]
    config: dict[str, Any] = {
        **family,
        "block_out_channels": widths,
        "layers_per_block": num_layers,
        "down_block_types": ["CrossAttnDownBlock2D" if _attends(found) else "DownBlock2D" for found in depths],
        "up_block_types": ["CrossAttnUpBlock2D" if _attends(found) else "UpBlock2D" for found in up_depths],
        "cross_attention_dim": _same(
            [shape[1] for name, shape in tensors.items() if name.endswith("attn2.to_k.weight")], "text widths"
        ),
        "use_linear_projection": any(
            len(shape) == 2 for name, shape in tensors.items() if name.endswith(".proj_in.weight")
        ),
        "attention_head_dim": _heads(family, widths),
        **_transformer_layers(depths, up_depths, middle),
    }
    _check_groups(widths, family.get("norm_num_groups", _GROUPS))
    if (embedded := tensors.get("label_emb.0.0.weight")) is not None:
        width, rest = divmod(embedded[1] - pooled_width, _NUM_SIZES)
        if width <= 0 or rest:
            raise ShapeError(f"it takes {embedded[1]} numbers beside the text, of which {pooled_width} are pooled text")
        config |= {"projection_class_embeddings_input_dim": embedded[1], "addition_time_embed_dim": width}
    return {key: value for key, value in config.items() if key in family or value != _UNET_DEFAULTS.get(key)}


def _levels(tensors: Tensors) -> list[list[_Block]]:
    levels: list[list[_Block]] = [[]]
    for number in range(1, _count(tensors, "input_blocks.")):
        if f"input_blocks.{number}.0.op.weight" in tensors:
            levels.append([])
        else:
            levels[-1].append(_block(tensors, f"input_blocks.{number}."))
    if not levels[0]:
        raise ShapeError("it has no blocks")
    return levels


def _ups(tensors: Tensors) -> list[_Block]:
    return [_block(tensors, f"output_blocks.{number}.") for number in range(_count(tensors, "output_blocks."))]


def _middle(tensors: Tensors) -> _Block | None:
    return _block(tensors, "middle_block.") if any(name.startswith("middle_block.") for name in tensors) else None


def _block(tensors: Tensors, prefix: str) -> _Block:
    name = f"{prefix}0.out_layers.3.weight"
    if name not in tensors:
        raise ShapeError(f"it lacks {name}")
    return _Block(tensors[name][0], _count(tensors, f"{prefix}1.transformer_blocks."))


def _transformer_layers(
    depths: Sequence[Sequence[int]], up_depths: Sequence[Sequence[int]], middle: _Block | None
) -> dict[str, Any]:
    """The transformer layers of every block, and the kind of the block in the middle, as diffusers has them."""
    found: dict[str, Any] = {}
    if middle is None:
        found["mid_block_type"] = None
    elif not middle.depth:
        found["mid_block_type"] = "UNetMidBlock2D"
    # What stands for a level without attention has no meaning, but in the last level it is that of the middle.
    down = [_short(level) if _attends(level) else 1 for level in depths]
    if middle is not None and middle.depth:
        if not _attends(depths[-1]):
            down[-1] = middle.depth
        elif depths[-1][0] != middle.depth:
            raise ShapeError(
                f"its middle has {middle.depth} transformer layers, its last level {depths[-1][0]}, which must agree"
            )
    up = [_short(level) if _attends(level) else own for level, own in zip(up_depths, reversed(down), strict=True)]
    if up != down[::-1] or any(isinstance(level, list) for level in down):
        found["reverse_transformer_layers_per_block"] = up
    found["transformer_layers_per_block"] = down[0] if len(set(map(str, down))) == 1 else down
    return found


def vae_config(tensors: Tensors, family: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of an AutoencoderKL.

    Args:
        tensors: In the authors' names, such as "encoder.conv_in.weight".
        family: The family's own.

    Raises:
        ShapeError: It cannot be such a model.
    """
    num_levels = _count(tensors, "encoder.down.")
    names = [f"encoder.down.{level}.block.0.conv1.weight" for level in range(max(1, num_levels))]
    if missing := [name for name in (*names, "decoder.conv_in.weight") if name not in tensors]:
        raise ShapeError(f"its VAE lacks {missing[0]}")
    widths = [tensors[name][0] for name in names]
    _check_groups(widths, family.get("norm_num_groups", _GROUPS))
    return {
        **family,
        "block_out_channels": widths,
        "layers_per_block": _count(tensors, "encoder.down.0.block."),
        "down_block_types": ["DownEncoderBlock2D"] * num_levels,
        "up_block_types": ["UpDecoderBlock2D"] * num_levels,
        "latent_channels": tensors["decoder.conv_in.weight"][1],
    }


def text_config(tensors: Tensors, family: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of a CLIP text encoder, OpenAI's or OpenCLIP's by its names.

    Args:
        tensors: In the authors' names, such as "text_model.embeddings.token_embedding.weight" or
            "token_embedding.weight".
        family: The family's own encoder in this place.

    Raises:
        ShapeError: It cannot be such a model.
    """
    named = part(tensors, "text_model.") or tensors  # old files have OpenAI's names without it
    is_openai = "embeddings.token_embedding.weight" in named
    if is_openai:
        tensors = named
        names = ["embeddings.token_embedding.weight", "embeddings.position_embedding.weight"]
        layers, inner = "encoder.layers.", "mlp.fc1.weight"
    else:
        names = ["token_embedding.weight", "positional_embedding"]
        layers, inner = "transformer.resblocks.", "mlp.c_fc.weight"
    names.append(f"{layers}0.{inner}")
    if missing := [name for name in names if name not in tensors]:
        raise ShapeError(f"its text encoder lacks {missing[0]}")
    (vocabulary, width), (positions, _), (inner_width, _) = (tensors[name] for name in names)
    num_layers = _count(tensors, layers)
    if not is_openai and num_layers == family["num_hidden_layers"] + 1:
        num_layers -= 1  # Stable Diffusion 2.x reads the last layer but one, so the last is left out
    projection = family["projection_dim"]
    if projection == family["hidden_size"] and "text_projection" in tensors:
        projection = tensors["text_projection"][1]  # only the second encoder of SDXL has one that is used
    head_width = family["hidden_size"] // family["num_attention_heads"]
    return {
        **family,
        "vocab_size": vocabulary,
        "max_position_embeddings": positions,
        "hidden_size": width,
        "intermediate_size": inner_width,
        "num_hidden_layers": num_layers,
        "num_attention_heads": _num_heads(width, head_width),
        "projection_dim": projection,
    }


def _count(tensors: Tensors, prefix: str) -> int:
    """How many blocks with numbers from 0 on there are under a prefix.

    Raises:
        ShapeError: One is missing.
    """
    numbers = {int(number) for name in part(tensors, prefix) if (number := name.partition(".")[0]).isdecimal()}
    if numbers != set(range(len(numbers))):
        missing = min(set(range(max(numbers))) - numbers)
        raise ShapeError(f"it lacks {prefix}{missing}")
    return len(numbers)


def _same(values: Sequence[int], what: str) -> int:
    if len(set(values)) != 1:
        raise ShapeError(f"it has different {what} ({', '.join(map(str, sorted(set(values)))) or 'none'})")
    return values[0]


def _attends(depths: Sequence[int]) -> bool:
    if 0 in depths and any(depths):
        raise ShapeError("only some blocks of a level have transformer layers")
    return any(depths)


def _short(depths: Sequence[int]) -> int | list[int]:
    return list(depths) if any(one != other for one, other in pairwise(depths)) else depths[0]


def _heads(family: Mapping[str, Any], widths: Sequence[int]) -> int | list[int]:
    """How many heads attention has: as many as the family at every width, or heads of the family's width."""
    heads = family["attention_head_dim"]  # diffusers' name for their number
    if isinstance(heads, int):
        if any(width % heads for width in widths):
            raise ShapeError(f"its widths ({', '.join(map(str, widths))}) are not multiples of {heads} heads")
        return heads
    return [_num_heads(width, family["block_out_channels"][0] // heads[0]) for width in widths]


def _num_heads(width: int, head_width: int) -> int:
    if width > head_width and width % head_width:
        raise ShapeError(f"a width of {width} is not a multiple of {head_width}, the width of a head")
    return max(1, width // head_width)


def _check_groups(widths: Sequence[int], groups: int) -> None:
    if any(width % groups for width in widths):
        told = ", ".join(map(str, widths))
        raise ShapeError(f"its widths ({told}) are not multiples of {groups}, the groups of norms")
