"""Captioners with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
    CLIPImageProcessor,
    GitConfig,
    GitForCausalLM,
    GitProcessor,
)

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "dog", "red", "ball", "the", "picture", "of", "in"]


VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
          "image_size": 32, "patch_size": 16}  # fmt: skip


TEXT = {"vocab_size": len(WORDS), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "max_position_embeddings": 64, "bos_token_id": 2, "eos_token_id": 3,
        "pad_token_id": 0}  # fmt: skip


def make(kind: str, folder: Path) -> Path:
    """A captioner of random weights in transformers' layout."""
    torch.manual_seed(0)
    tokenizer = BertTokenizer(
        vocab={word: index for index, word in enumerate(WORDS)}, model_input_names=["input_ids", "attention_mask"]
    )
    if kind == "blip":
        text = {**TEXT, "sep_token_id": 3, "encoder_hidden_size": 16}
        config = BlipConfig(text_config=text, vision_config=VISION, projection_dim=16, image_text_hidden_size=16)
        model: Any = BlipForConditionalGeneration(config)
        processor: Any = BlipProcessor(BlipImageProcessor(size={"height": 32, "width": 32}), tokenizer)
    else:
        model = GitForCausalLM(GitConfig(vision_config=VISION, **TEXT))
        images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
        processor = GitProcessor(images, tokenizer)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8)  # or every image is told the same
        # No marks, not even the one that ends a caption, so that there are always words.
        head = model.get_output_embeddings() if kind == "git" else model.text_decoder.get_output_embeddings()
        head.bias[:5] = -1e4
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
