"""CLIP's tokenizer from the bundled merges, for checkpoints in one file, which hold none."""

from __future__ import annotations

import gzip
from importlib.resources import files
from typing import Literal

from transformers import CLIPTokenizer

MAX_TOKENS = 77
START, END = "<|startoftext|>", "<|endoftext|>"


def clip_tokenizer(padding: Literal["<|endoftext|>", "!"]) -> CLIPTokenizer:
    """The tokenizer that OpenAI's and OpenCLIP's text encoders share.

    Args:
        padding: The padding token: the end token for OpenAI's encoder, "!" (token 0) for OpenCLIP's.

    Source: Radford et al. 2103.00020, section 2.4: byte-pair encoding, lower-cased, of 49,152 words and two special
    tokens.
    """
    packed = files("sdlora.models").joinpath("clip/merges.txt.gz").read_bytes()
    merges = [tuple(line.split()) for line in gzip.decompress(packed).decode("utf-8").splitlines()]
    letters = [*_letters(), *(f"{letter}</w>" for letter in _letters())]
    tokens = [*letters, *("".join(pair) for pair in merges), START, END]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, pad_token=padding, model_max_length=MAX_TOKENS)


def _letters() -> list[str]:
    """The 256 bytes as characters: printable ones unchanged, then the others, moved beyond them."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = 256 - len(printable)
    return [chr(code) for code in printable] + [chr(256 + index) for index in range(others)]
