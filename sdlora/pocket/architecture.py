"""The parts that pocket is made of: a Stable Diffusion 1.x in every respect but its size.

Used by `pretrain`. Block types, schedule and folder layout are those of SD 1.5; widths are smaller, and the
tokenizer's vocabulary holds the letters and the words of pocket's world.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from tokenizers import pre_tokenizers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from sdlora.pocket import world

TEXT_WIDTH = 128
MAX_TOKENS = 77
START, END = "<|startoftext|>", "<|endoftext|>"


def vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The byte-pair vocabulary: all bytes, and merges that make one token of every word of the world.

    Any other word is spelt in letters, so that every caption and every trigger word has tokens of its own.
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges: list[tuple[str, str]] = []
    for word in world_words():
        # Joining what the earlier merges leave of a word never changes the words before it.
        pieces = merged([*word[:-1], word[-1] + "</w>"], merges)
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            pieces = [pieces[0] + pieces[1], *pieces[2:]]
    tokens = [*letters, *(letter + "</w>" for letter in letters), *(left + right for left, right in merges), START, END]
    return {token: index for index, token in enumerate(dict.fromkeys(tokens))}, merges


def world_words() -> list[str]:
    """The words of the world's captions, in alphabetical order, but for those of one letter."""
    phrases = [*world.KINDS, *world.COLORS, *world.PATTERNS, *world.SIZES, *world.POSITIONS, "named", "a", "an"]
    phrases += [phrase for phrase, _ in world.PLACES.values()]
    return sorted({word for phrase in phrases for word in phrase.split() if len(word) > 1})


def merged(pieces: list[str], merges: list[tuple[str, str]]) -> list[str]:
    """A word's pieces under byte-pair merges, the earliest merge first."""
    rank = {merge: index for index, merge in enumerate(merges)}
    while pairs := [(rank[pair], i) for i, pair in enumerate(pairwise(pieces)) if pair in rank]:
        _, at = min(pairs)
        pieces = [*pieces[:at], pieces[at] + pieces[at + 1], *pieces[at + 2 :]]
    return pieces


def build_tokenizer(folder: Path) -> CLIPTokenizer:
    """Write the tokenizer's files into `folder` and load it from there."""
    folder.mkdir(parents=True, exist_ok=True)
    vocab, merges = vocabulary()
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(merge) for merge in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    tokenizer = CLIPTokenizer(
        vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"), model_max_length=MAX_TOKENS
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def build_vae() -> AutoencoderKL:
    """The autoencoder: 64x64 images to 16x16 latents of four channels."""
    return AutoencoderKL(
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        norm_num_groups=16,
        sample_size=64,
    )


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """The text encoder, trained together with the UNet."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        hidden_act="quick_gelu",
        projection_dim=TEXT_WIDTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def build_unet() -> UNet2DConditionModel:
    """The denoiser, with SD 1.5's block types at three resolutions."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(48, 96, 160),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        mid_block_type="UNetMidBlock2DCrossAttn",
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def build_scheduler() -> DDIMScheduler:
    """SD 1.5's noise schedule with epsilon prediction, sampled by DDIM."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="epsilon",
    )
