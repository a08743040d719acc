"""Selectors: how settings name layers of a base model: by kind, by block, or by a pattern of their paths.

`lora.targets` and the tables of ranks, alphas and learning rates take them; `Blocks` knows how a network's blocks are
numbered. Paths may have underscores for dots, as in LoRA files.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import translate
from functools import cache
from typing import TypeVar

from sdlora.errors import ConfigError

Numeric = TypeVar("Numeric", int, float)
KINDS = ("cross_attention", "self_attention", "attention", "mlp", "projection", "conv", "text_encoder")
"""What a layer can be."""
STAGES = {
    "down": r"down_blocks_.*", "mid": r"mid_block_.*", "up": r"up_blocks_.*",
    "text_encoder_1": r"text_encoder_(?!2_).*", "text_encoder_2": r"text_encoder_2_.*",
}  # fmt: skip
"""Parts of a base model that have a name, and the paths of their layers."""
REGEX = "re:"
_NUMBERS = re.compile(r"(\d{1,3})(?:-(\d{1,3}))?")
_TEXT = "text_encoder"
_UNET_BLOCK = re.compile(r"(down|up)_blocks_(\d+)_(resnets|attentions|downsamplers|upsamplers)_(\d+)_.*")
_TRANSFORMER_BLOCK = re.compile(r"(layers|transformer_blocks|single_transformer_blocks)_(\d+)_.*")


def check_selector(selector: str) -> str:
    """A selector as it is, if it can be read; a leading "!" is left to the caller.

    Raises:
        ValueError: It is none.
    """
    if selector in KINDS or selector in STAGES:
        return selector
    if match := _NUMBERS.fullmatch(selector):
        if match[2] and int(match[2]) < int(match[1]):
            raise ValueError(f"the blocks {selector!r} run backwards; write {match[2]}-{match[1]}")
        return selector
    if selector.startswith(REGEX):
        try:
            re.compile(selector.removeprefix(REGEX))
        except re.error as error:
            raise ValueError(f"{selector!r} is not a regular expression: {error}") from error
        return selector
    if any(sign in selector for sign in "*?["):
        return selector
    near = difflib.get_close_matches(selector, [*KINDS, *STAGES], n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"kinds are {', '.join(KINDS)}"
    raise ValueError(
        f"{selector!r} is neither a kind of layer, nor a part ({', '.join(STAGES)}), nor block numbers such as 4 or "
        f"0-7, nor a pattern of paths with '*' or after '{REGEX}'; {hint}"
    )


def is_of_text(selector: str) -> bool:
    """Whether a selector is of text encoders; every other one is of the network that denoises."""
    return selector.removeprefix(REGEX).startswith(_TEXT)


@dataclass(frozen=True)
class Blocks:
    """How the blocks of a network are numbered.

    A UNet's as kohya's block lists and most tools for merging by block do: first the input blocks (conv_in is 0), then
    the middle, then the output blocks: 0 to 24 in Stable Diffusion, 0 to 18 in XL. A transformer's in the order in
    which they compute.

    Attributes:
        num_down: Down blocks of a UNet.
        depth: ResNets in each.
        num_double: Transformer blocks before the single ones.
    """

    num_down: int = 0
    depth: int = 0
    num_double: int = 0

    @classmethod
    def of(cls, paths: Iterable[str]) -> Blocks:
        """The numbering of a network by the paths of its modules."""
        named = [_plain(path) for path in paths]

        def count(pattern: str) -> int:
            found = [int(match[1]) for path in named if (match := re.match(pattern, path))]
            return max(found, default=-1) + 1

        return cls(
            count(r"down_blocks_(\d+)_"), count(r"down_blocks_\d+_resnets_(\d+)"), count(r"transformer_blocks_(\d+)_")
        )

    @property
    def middle(self) -> int:
        """The number of a UNet's middle block."""
        return self.num_down * (self.depth + 1)

    def number(self, path: str) -> int | None:
        """The number of the block that a layer is in, or None outside of blocks."""
        plain = _plain(path)
        if plain.startswith("mid_block_"):
            return self.middle
        if match := _UNET_BLOCK.fullmatch(plain):
            block, part, place = int(match[2]), match[3], int(match[4])
            inside = block * (self.depth + 1) + (self.depth if part.endswith("samplers") else place)
            return inside + 1 if match[1] == "down" else self.middle + 1 + inside
        if match := _TRANSFORMER_BLOCK.fullmatch(plain):
            return int(match[2]) + (self.num_double if match[1].startswith("single") else 0)
        return None

    def selects(self, selector: str, path: str, kind: str | None) -> bool:
        """Whether a selector is of the layer at a path, whose kind is known."""
        if selector in KINDS:
            return selector == kind
        plain = _plain(path)
        if plain.startswith(f"{_TEXT}_") is not is_of_text(selector):
            return False
        if selector in STAGES:
            return re.fullmatch(STAGES[selector], plain) is not None
        if match := _NUMBERS.fullmatch(selector):
            number = self.number(path)
            return number is not None and int(match[1]) <= number <= int(match[2] or match[1])
        return _pattern(selector).fullmatch(plain) is not None

    def value(self, table: Mapping[str, Numeric], path: str, kind: str | None, default: Numeric) -> Numeric:
        """The value of a layer in a table by selector, in which the last of several that match counts."""
        return next((table[name] for name in reversed(list(table)) if self.selects(name, path, kind)), default)

    def refuse_unused(self, option: str, table: Mapping[str, object], layers: Mapping[str, str | None]) -> None:
        """Refuse a table with an entry that matches none of the layers that are trained, given with their kinds.

        Kinds may, so that one table serves runs with other targets, as it did when there was nothing but kinds.

        Raises:
            ConfigError: There is one.
        """
        for name in table:
            if name not in KINDS and not any(self.selects(name, path, kind) for path, kind in layers.items()):
                raise ConfigError(f"{option}: {name!r} matches none of the {len(layers)} layers that are trained.")


def _plain(path: str) -> str:
    return path.replace(".", "_")


@cache
def _pattern(selector: str) -> re.Pattern[str]:
    """A glob or a regular expression, of paths with underscores for dots."""
    if selector.startswith(REGEX):
        return re.compile(selector.removeprefix(REGEX).replace(r"\.", "_"))
    return re.compile(translate(_plain(selector)))
