"""Tokens, against those that CLIP's own tokenizer is known to give."""

from __future__ import annotations

import pytest
import torch
from helpers.tiny import small_tokenizer

from sdlora.models.text import clip_tokenizer, references_to_other_files, tokens_in_windows

# From the documentation and examples of CLIP and Stable Diffusion.
KNOWN = {
    "a photo of a cat": [49406, 320, 1125, 539, 320, 2368, 49407],
    "a photo of an astronaut riding a horse on mars": [
        49406, 320, 1125, 539, 550, 18376, 6765, 320, 4558, 525, 7496, 49407,
    ],
    "hello world!": [49406, 3306, 1002, 256, 49407],
}  # fmt: skip


def test_vocabulary_is_that_of_clip() -> None:
    tokenizer = clip_tokenizer("<|endoftext|>")
    assert len(tokenizer) == 49408
    for text, ids in KNOWN.items():
        assert tokenizer(text).input_ids == ids
        assert tokenizer(f"  {text.upper()} ").input_ids == ids
    assert (tokenizer.pad_token_id, clip_tokenizer("!").pad_token_id) == (49407, 0)


@pytest.mark.parametrize("padding", ["<|endoftext|>", "!"])
def test_single_window_equals_the_tokenizers_output(padding: str) -> None:
    tokenizer = small_tokenizer(padding)
    captions = ["", "a cat", "zumi " * 200]
    expected = tokenizer(captions, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    assert torch.equal(tokens_in_windows(tokenizer, captions, 1)[:, 0], expected)


def test_windows_are_consecutive_and_the_rest_is_cut_off() -> None:
    tokenizer = small_tokenizer("<|endoftext|>")
    ids = tokenizer("zumi the cat by the sea " * 60, add_special_tokens=False, verbose=False).input_ids
    assert len(ids) > 225
    windows = tokens_in_windows(tokenizer, ["zumi the cat by the sea " * 60], 3)[0]
    assert windows.shape == (3, 77)
    assert windows[:, 1:76].flatten().tolist() == ids[:225]
    assert windows[:, 0].tolist() == [tokenizer.bos_token_id] * 3
    assert windows[:, 76].tolist() == [tokenizer.eos_token_id] * 3


def test_references_to_other_files_are_found() -> None:
    assert references_to_other_files("a cat, embedding:zumi, <lora:hero:0.8>") == ["embedding:zumi,", "<lora:hero:0.8>"]
    assert references_to_other_files("a <zumi> with embedding on the lora farm") == []
