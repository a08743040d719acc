"""Captions to windows of 77 tokens, and CLIP's tokenizer for checkpoints in one file, which hold none.

Shapes: B batch, N windows, L tokens of a window (77).
"""

from __future__ import annotations

import gzip
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Literal

import torch
from torch import Tensor
from transformers import CLIPTokenizer

_MAX_TOKENS = 77
_START, _END = "<|startoftext|>", "<|endoftext|>"
# References to other files in ComfyUI and A1111, which remove them from a prompt before encoding it.
_CALLS = re.compile(r"embedding:\S+|<(?:lora|lyco|hypernet):[^>]*>", re.IGNORECASE)


@dataclass(frozen=True)
class TextOptions:
    """How captions are read."""

    clip_skip: int | None = None  # the layer to read, counted from the last (1); None for the family's own
    max_windows: int = 1  # how many windows of 75 tokens a caption may fill


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


def references_to_other_files(caption: str) -> list[str]:
    """References to textual inversions and other networks in a caption, which are not words."""
    return _CALLS.findall(caption)


def clip_tokenizer(padding: Literal["<|endoftext|>", "!"]) -> CLIPTokenizer:
    """The tokenizer that OpenAI's and OpenCLIP's text encoders share, from the bundled merges.

    Args:
        padding: The padding token: the end token for OpenAI's encoder, "!" (token 0) for OpenCLIP's.

    Source: Radford et al. 2103.00020, section 2.4: byte-pair encoding, lower-cased, of 49,152 words and two special
    tokens.
    """
    packed = files("sdlora.models").joinpath("clip/merges.txt.gz").read_bytes()
    merges = [tuple(line.split()) for line in gzip.decompress(packed).decode("utf-8").splitlines()]
    # The 256 bytes as characters: printable ones unchanged, then the others, moved beyond them.
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = [chr(code) for code in (*printable, *range(256, 512 - len(printable)))]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in merges), _START, _END]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, pad_token=padding, model_max_length=_MAX_TOKENS)
