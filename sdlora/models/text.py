"""From captions to tokens in windows of 77, and from a CLIP text encoder's layers to the states that a UNet is given.

Shapes: B batch, N windows, L tokens of a window (77), D text width.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPTokenizer

from sdlora.errors import ConfigError

# ComfyUI's and A1111's ways to call up other files; both are taken out of a prompt before it is encoded.
_CALLS = re.compile(r"embedding:\S+|<(?:lora|lyco|hypernet):[^>]*>", re.IGNORECASE)


@dataclass(frozen=True)
class TextOptions:
    """How captions are read.

    Attributes:
        clip_skip: Which layer is read, counted from the last, which is 1; None for the family's own.
        max_windows: How many windows of 75 tokens are read of a caption.
    """

    clip_skip: int | None = None
    max_windows: int = 1


def tokens_in_windows(tokenizer: CLIPTokenizer, captions: Sequence[str], max_windows: int) -> Tensor:
    """Token ids, (B, N, L): every window has its own start and end mark; what is longer is cut off.

    Empty windows are read as well, as the empty caption, so that all captions have states of one shape.
    """
    length = tokenizer.model_max_length
    size = length - 2
    found: list[list[list[int]]] = []
    for caption in captions:
        ids = tokenizer(caption, add_special_tokens=False, truncation=False, verbose=False).input_ids
        parts = [ids[first : first + size] for first in range(0, max_windows * size, size)]
        marked = [[tokenizer.bos_token_id, *part, tokenizer.eos_token_id] for part in parts]
        found.append([part + [tokenizer.pad_token_id] * (length - len(part)) for part in marked])
    return torch.tensor(found)


def layer_states(encoder: Any, tokens: Tensor, clip_skip: int) -> Tensor:
    """The states after a layer, counted from the last one, through the encoder's last norm: (B, L, D)."""
    if clip_skip == 1:
        last: Tensor = encoder(tokens).last_hidden_state
        return last
    states: Tensor = encoder(tokens, output_hidden_states=True).hidden_states[-clip_skip]
    normed: Tensor = getattr(encoder, "text_model", encoder).final_layer_norm(states)
    return normed


def check_clip_skip(clip_skip: int | None, num_layers: int, path: str) -> int:
    """The layer to read of an encoder from whose layers one may choose.

    Raises:
        ConfigError: It has fewer layers.
    """
    if clip_skip is not None and clip_skip > num_layers:
        raise ConfigError(f"base.clip_skip is {clip_skip}: the text encoder of {path!r} has {num_layers} layers.")
    return clip_skip or 1


def check_no_clip_skip(clip_skip: int | None, family: str) -> None:
    """Refuse to choose a layer where the family's UNet was trained on the last but one alone.

    Raises:
        ConfigError: Another layer is asked for.
    """
    if clip_skip not in (None, 2):
        raise ConfigError(
            f"base.clip_skip is {clip_skip}: {family} always reads the last layer but one, which is 2. Leave it unset."
        )


def calls_of_other_files(caption: str) -> list[str]:
    """What of a caption calls up a textual inversion or another network, and is no word."""
    return _CALLS.findall(caption)
