"""A small base model's shapes, and memory inputs for it."""

from __future__ import annotations

from typing import Any

import torch

from sdlora.config.schema import RunConfig
from sdlora.config.toml import parse_config
from sdlora.estimate.memory import MemoryInputs
from sdlora.estimate.meta_model import Shapes
from sdlora.lora.inject import AdapterSpec

SMALL = Shapes(
    network={
        "sample_size": 16, "block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "cross_attention_dim": 32, "attention_head_dim": 4,
    },
    vae={
        "block_out_channels": (8, 8), "down_block_types": ("DownEncoderBlock2D",) * 2, "norm_num_groups": 4,
        "up_block_types": ("UpDecoderBlock2D",) * 2, "latent_channels": 4, "layers_per_block": 1,
    },
    text_encoders=({"hidden_size": 32, "max_position_embeddings": 77, "num_hidden_layers": 1},),
    vae_bytes=400,
    text_bytes=600,
)  # fmt: skip


def memory_inputs(dtype: torch.dtype = torch.float32, **train: Any) -> MemoryInputs:
    return MemoryInputs(memory_config(**train), AdapterSpec(), SMALL, dtype, (64, 64))


def memory_config(**train: Any) -> RunConfig:
    document = {"data": {"folder": "x", "resolution_px": 64}, "train": train, "preview": {"enabled": False}}
    return parse_config(document, name="x")
