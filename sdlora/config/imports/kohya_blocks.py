"""sd-scripts' lists by block: ranks, alphas and factors of the learning rate, as tables by block number.

Functions of the table in `kohya`. Blocks are numbered as `sdlora.common.selectors.Blocks` numbers a UNet's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from sdlora.config.imports.rules import OFF, Outcome, Source, dropped, number, refused, text, translated, whole

# Blocks by place in a list of all: 25 in Stable Diffusion; 23 in XL, where embeddings come first and last.
_PLACES: dict[int, Sequence[int | None]] = {
    25: range(25),
    23: [None, *range(9), 9, 9, 9, *range(10, 19), None],
}
_ARGS = "network_args."


def table(values: Mapping[int, float]) -> dict[str, float]:
    """Values by block number as a table by selectors, neighbours of the same value together."""
    found = {}
    for _, run in groupby(sorted(values.items()), key=lambda item: (item[1], item[0] - sorted(values).index(item[0]))):
        (first, value), *rest = run
        found[f"{first}-{rest[-1][0]}" if rest else str(first)] = value
    return found


def _list(value: Any) -> list[float]:
    parts = value if isinstance(value, list) else re.split(r"[,\s]+", text(value).strip("[] "))
    return [number(part) if part not in ("", None) else 0 for part in parts]


def _by_block(source: Source, key: str) -> dict[int, float]:
    """A list with a value for every block, by block number.

    Raises:
        ValueError: It has another length, or differs inside of XL's middle block.
    """
    values = _list(source.get(f"{_ARGS}{key}"))
    if len(values) not in _PLACES:
        raise ValueError(f"{len(values)} values, and there are 25 blocks in Stable Diffusion, 23 in XL")
    found: dict[int, float] = {}
    for place, value in zip(_PLACES[len(values)], values, strict=True):
        if place is not None and found.setdefault(place, value) != value:
            raise ValueError("the middle block has one value in sdlora, and these differ")
    # A LoRA is on none of the first block, which is one convolution.
    return {place: value for place, value in found.items() if place}


def _factors(source: Source) -> dict[int, float]:
    """Factors of the learning rate by block number.

    Raises:
        ValueError: They are given by the name of a curve, or by another number of blocks.
    """
    xl = len(_list(source.get(f"{_ARGS}mid_lr_weight", "1"))) == 3
    given = {part: source.get(f"{_ARGS}{part}_lr_weight") for part in ("down", "mid", "up")}
    if xl is False and any(value is not None and len(_list(value)) == 9 for value in (given["down"], given["up"])):
        xl = True
    middle = 9 if xl else 12
    found: dict[int, float] = {}
    for part, first in (("down", 0), ("mid", middle), ("up", middle + 1)):
        if given[part] is None:
            continue
        values = _list(given[part])
        if part == "mid" and len(set(values)) == 1:
            values = values[:1]
        if len(values) != (1 if part == "mid" else middle):
            raise ValueError(f"{part}_lr_weight has {len(values)} values, and there are {middle} blocks")
        found |= {first + place: value for place, value in enumerate(values)}
    lowest = number(source.get(f"{_ARGS}block_lr_zero_threshold", 0))
    found = {place: value if value > lowest else 0 for place, value in found.items()}
    return {place: value for place, value in found.items() if place}


def excluded(source: Source) -> list[str]:
    """What leaves out the blocks that have no rank or no learning rate, for lora.targets."""
    try:
        ranks = _by_block(source, "block_dims") if source.get(f"{_ARGS}block_dims") is not None else {}
        zero = {place: 0.0 for values in (ranks, _factors(source)) for place, value in values.items() if value == 0}
    except ValueError:
        return []  # the keys themselves are refused
    return [f"!{name}" for name in table(zero)]


def ranks(value: Any, source: Source) -> Outcome:
    """Ranks and alphas by block and of convolutions, together, since they are one table each."""
    options: dict[str, Any] = {}
    tables: dict[str, dict[str, float]] = {"lora.target_ranks": {}, "lora.target_alphas": {}}
    remark = ""
    for option, key, default in (
        ("lora.target_ranks", "block_dims", source.get("network_dim")),
        ("lora.target_alphas", "block_alphas", source.get("network_alpha")),
    ):
        if source.get(_ARGS + key) is not None:
            values = {place: one for place, one in _by_block(source, key).items() if one not in (0, number(default))}
            tables[option] |= table(values)
    for key in ("conv_block_dims", "conv_block_alphas"):
        if source.get(_ARGS + key) is not None and len(set(_by_block(source, key).values())) > 1:
            return refused("sdlora has one rank and one alpha for all convolutions; see lora.target_ranks")
    conv = source.get(f"{_ARGS}conv_dim")
    if source.get(f"{_ARGS}conv_block_dims") is not None:
        conv = next(iter(_by_block(source, "conv_block_dims").values()))
    if conv is not None and whole(conv):
        alpha = number(source.get(f"{_ARGS}conv_alpha", 1)) or whole(conv)
        tables["lora.target_ranks"]["conv"] = whole(conv)
        tables["lora.target_alphas"]["conv"] = alpha
        remark = "also of the shortcuts, which sd-scripts gives network_dim, and without its time embeddings"
    options = {name: entries for name, entries in tables.items() if entries}
    return translated(options, remark) if options else dropped("the same in all blocks")


def rates(value: Any, source: Source, own: Mapping[str, float]) -> Outcome:
    """Learning rates by block, with those of text encoders in `own`, since they are one table."""
    if text(source.get("optimizer_type", "")).lower() == "prodigy":
        return refused("with Prodigy all layers have one learning rate; set train.target_learning_rates otherwise")
    base = number(source.get("unet_lr") or source.get("learning_rate"))
    by_block = {place: base * factor for place, factor in _factors(source).items() if factor not in (0, 1)}
    found = {**table(by_block), **own}
    return translated({"train.target_learning_rates": found}) if found else dropped("the same in all blocks")


def is_given(source: Source) -> bool:
    """Whether any factor of the learning rate is given by block."""
    return any(source.get(f"{_ARGS}{part}_lr_weight") not in OFF for part in ("down", "mid", "up"))
