"""How much of a caption a base model reads: its tokens, and the words that no window has room for."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from transformers import CLIPTokenizer

from sdlora.common.bundled import pocket_folder
from sdlora.models.unet import clip_tokenizer

WINDOW_TOKENS = 75


@dataclass(frozen=True)
class Reading:
    """A caption as a text encoder reads it; `unread` are the words at its end that are cut off."""

    num_tokens: int
    most: int
    unread: str = ""


@functools.lru_cache(maxsize=8192)
def read_caption(caption: str, num_windows: int, *, is_pocket: bool) -> Reading:
    """Count the tokens of a caption, the trigger included.

    Args:
        caption: As it is trained.
        num_windows: How many windows of 75 tokens it may fill.
        is_pocket: Whether the built-in base model reads it, which has a vocabulary of its own.
    """
    most = num_windows * WINDOW_TOKENS
    offsets = _tokenizer(is_pocket)(
        caption, add_special_tokens=False, truncation=False, verbose=False, return_offsets_mapping=True
    ).offset_mapping
    return Reading(len(offsets), most, caption[offsets[most][0] :].strip() if len(offsets) > most else "")


@functools.cache
def _tokenizer(is_pocket: bool) -> CLIPTokenizer:
    if is_pocket:
        found: CLIPTokenizer = CLIPTokenizer.from_pretrained(pocket_folder() / "tokenizer")
        return found
    return clip_tokenizer("<|endoftext|>")
