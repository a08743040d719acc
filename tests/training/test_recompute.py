"""Frozen operations against torch's own, to the last bit."""

from __future__ import annotations

import copy
from typing import Any

import torch
from counts import saved_for_backward
from diffusers import UNet2DConditionModel
from diffusers.models.activations import GEGLU
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from sdlora.training.recompute import keep_little


def make_unet() -> Any:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, cross_attention_dim=16,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=4,
    ).requires_grad_(False).eval()  # fmt: skip


def answer(unet: Any, x: torch.Tensor) -> torch.Tensor:
    text = torch.randn(2, 77, 16, generator=torch.Generator().manual_seed(1))
    found: torch.Tensor = unet(x, torch.tensor([5, 900]), text).sample
    return found


def test_outputs_and_gradients_are_bit_identical_and_less_is_kept() -> None:
    plain = make_unet()
    lean = copy.deepcopy(plain)
    keep_little(lean)
    assert list(lean.state_dict()) == list(plain.state_dict())
    results = []
    for unet in (plain, lean):
        x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
        with torch.no_grad():
            before = answer(unet, x)
        with saved_for_backward(unet) as saved:
            found = answer(unet, x)
        found.square().sum().backward()
        assert torch.equal(before, found)
        results.append((found, x.grad, saved.held_bytes))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert results[1][2] < 0.75 * results[0][2]


def test_trained_convolutions_keep_what_they_need() -> None:
    unet = make_unet()
    keep_little(unet)
    unet.conv_in.requires_grad_(True)
    answer(unet, torch.ones(2, 4, 8, 8)).sum().backward()
    assert unet.conv_in.weight.grad.abs().sum() > 0


def test_each_operation_keeps_what_cannot_be_recomputed() -> None:
    x = torch.randn(2, 16, 8, 8, requires_grad=True)
    block = ResnetBlock2D(in_channels=16, temb_channels=None, groups=4).requires_grad_(False)
    gate = GEGLU(16, 32).requires_grad_(False)
    holder = nn.Module()
    holder.block, holder.gate = block, gate
    holder.conv_norm_out = holder.conv_act = None
    keep_little(holder)  # type: ignore[arg-type]
    size = 4 * x.numel()
    with saved_for_backward(holder) as saved:
        block(x, None)
    # Its input, what comes between its convolutions, and the groups' means and deviations.
    assert saved.held_bytes == 2 * size + 4 * (2 * 4 * 2 * 2)
    tokens = torch.randn(2, 64, 16, requires_grad=True)
    with saved_for_backward(holder) as saved:
        gate(tokens)
    assert saved.held_bytes == 4 * 2 * 64 * 64
