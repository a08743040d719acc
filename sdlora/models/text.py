"""Captions to windows of 77 tokens, and a CLIP text encoder's layer to text embeddings.

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

# References to other files in ComfyUI and A1111, which remove them from a prompt before encoding it.
_CALLS = re.compile(r"embedding:\S+|<(?:lora|lyco|hypernet):[^>]*>", re.IGNORECASE)


@dataclass(frozen=True)
class TextOptions:
    """How captions are read.

    Attributes:
        clip_skip: The layer to read, counted from the last (1); None for the family's own.
        max_windows: How many windows of 75 tokens a caption may fill.
    """

    clip_skip: int | None = None
    max_windows: int = 1


def tokens_in_windows(tokenizer: CLIPTokenizer, captions: Sequence[str], max_windows: int) -> Tensor:
    """Token ids (B, N, L); every window has its own start and end token, and longer captions are cut off.

    Unused windows hold the empty caption, so that the embeddings of all captions have one shape.
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


def layer_embeddings(encoder: Any, tokens: Tensor, clip_skip: int) -> Tensor:
    """The hidden states of a layer, counted from the last (1), after the final layer norm: (B, L, D)."""
    if clip_skip == 1:
        last: Tensor = encoder(tokens).last_hidden_state
        return last
    states: Tensor = encoder(tokens, output_hidden_states=True).hidden_states[-clip_skip]
    normed: Tensor = getattr(encoder, "text_model", encoder).final_layer_norm(states)
    return normed


def check_clip_skip(clip_skip: int | None, num_layers: int, path: str) -> int:
    """The layer to read, counted from the last (1).

    Raises:
        ConfigError: The encoder has fewer layers.
    """
    if clip_skip is not None and clip_skip > num_layers:
        raise ConfigError(
            f"base.clip_skip is {clip_skip}, but the text encoder of {path!r} has only {num_layers} layers."
        )
    return clip_skip or 1


def refuse_clip_skip(clip_skip: int | None, family: str) -> None:
    """Refuse any layer but the second to last, on which the family's UNet was trained.

    Raises:
        ConfigError: Another layer was requested.
    """
    if clip_skip not in (None, 2):
        raise ConfigError(
            f"base.clip_skip is {clip_skip}, but {family} always reads the second to last layer (2). Leave it unset."
        )


def references_to_other_files(caption: str) -> list[str]:
    """References to textual inversions and other networks in a caption, which are not words."""
    return _CALLS.findall(caption)
