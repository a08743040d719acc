"""Attention for training against diffusers' own."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from helpers.adapters import outputs

from sdlora.lora.layers import TrainingAttention, use_training_attention


def test_outputs_equal_diffusers_attention(unet: Any) -> None:
    with torch.no_grad():
        before = outputs(unet)
        use_training_attention(unet)
        assert torch.equal(outputs(unet), before)
    assert all(isinstance(processor, TrainingAttention) for processor in unet.attn_processors.values())


def test_masked_attention_falls_back_to_diffusers() -> None:
    torch.manual_seed(0)
    attn = Attention(16, heads=2, dim_head=8)
    x, mask = torch.randn(2, 5, 16), torch.zeros(2, 1, 5)
    mask[:, :, 3:] = -10_000.0
    expected = AttnProcessor2_0()(attn, x, None, mask)
    assert torch.equal(TrainingAttention()(attn, x, None, mask), expected)
    assert not torch.allclose(TrainingAttention()(attn, x), expected)


def test_other_kinds_of_attention_keep_their_processor() -> None:
    holder = torch.nn.ModuleList([Attention(16, heads=2, dim_head=8, residual_connection=True)])
    use_training_attention(holder)
    assert type(holder[0].processor) is AttnProcessor2_0
