"""Lean operations of transformers: diffusers' results, up to rounding, while less is kept for the backward pass."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
from diffusers import Flux2Transformer2DModel, ZImageTransformer2DModel
from torch import Tensor, nn

from sdlora.estimate.meta_model import counted
from sdlora.models import flux2, z_image
from sdlora.models.lean_transformer import (
    _RmsNorm,
    _Rotation,
    _Swiglu,
    _SwigluOfHalves,
    keep_little_of_transformer,
)

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from counts import KernelCounter, saved_for_backward

TINY = {
    "z-image": {"dim": 48, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2, "cap_feat_dim": 16,
                "axes_dims": [8, 8, 8], "axes_lens": [64, 64, 64], "in_channels": 4},
    "flux2": {"in_channels": 16, "num_layers": 1, "num_single_layers": 2, "attention_head_dim": 16,
              "num_attention_heads": 2, "joint_attention_dim": 12, "axes_dims_rope": [4, 4, 4, 4],
              "guidance_embeds": False},
}  # fmt: skip


def network(family: str, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    kind = ZImageTransformer2DModel if family == "z-image" else Flux2Transformer2DModel
    made = kind.from_config(TINY[family])
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.2)  # padding tokens are not initialised
    return made.to(dtype).requires_grad_(False).eval()


def velocity(family: str, made: nn.Module, noisy: Tensor) -> Tensor:
    draw = torch.Generator().manual_seed(1)
    dtype = noisy.dtype
    if family == "z-image":
        states = [torch.randn(length, 16, generator=draw).to(dtype) for length in (5, 9)]
        return z_image.velocity(made, noisy, torch.tensor([0.3, 0.8]), states)
    states = torch.randn(2, 7, 12, generator=draw).to(dtype)
    return flux2.velocity(made, noisy, torch.tensor([0.3, 0.8]), states)


def gradient(family: str, made: nn.Module, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The velocity, and a gradient of the noisy latents and of a weight, after which all others come."""
    noisy = torch.randn(2, int(TINY[family]["in_channels"]), 8, 8, generator=torch.Generator().manual_seed(2))
    noisy = noisy.to(dtype).requires_grad_()
    found = velocity(family, made, noisy)
    (grad,) = torch.autograd.grad(found.square().sum(), noisy)
    return found.detach(), grad


@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 0.0), (torch.float32, 2e-5), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("family", list(TINY))
def test_velocity_and_gradient_are_diffusers(family: str, dtype: torch.dtype, error: float) -> None:
    plain = network(family, dtype)
    lean = copy.deepcopy(plain)
    keep_little_of_transformer(lean)
    for found, expected in zip(gradient(family, lean, dtype), gradient(family, plain, dtype), strict=True):
        assert (found - expected).norm() / expected.norm() <= error
    with torch.no_grad():
        noisy = torch.randn(2, int(TINY[family]["in_channels"]), 8, 8).to(dtype)
        assert torch.equal(velocity(family, lean, noisy), velocity(family, plain, noisy)), "previews are diffusers' own"


@pytest.mark.parametrize("family", list(TINY))
def test_less_is_kept(family: str) -> None:
    kept = []
    for is_lean in (False, True):
        made = network(family, torch.bfloat16)
        if is_lean:
            keep_little_of_transformer(made)
        noisy = torch.randn(2, int(TINY[family]["in_channels"]), 8, 8).bfloat16().requires_grad_()
        with saved_for_backward(made) as saved, KernelCounter():
            velocity(family, made, noisy)
        kept.append(saved.held_bytes)
    assert kept[1] < 0.8 * kept[0]


def test_the_input_that_is_computed_again_trains_a_layer_as_if_it_were_kept() -> None:
    lean = network("flux2", torch.float32)
    plain = copy.deepcopy(lean)
    keep_little_of_transformer(lean)
    grads = []
    for made in (lean, plain):
        weight = made.single_transformer_blocks[1].attn.to_out.weight.requires_grad_()
        noisy = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(2)).requires_grad_()
        grads.append(torch.autograd.grad(velocity("flux2", made, noisy).square().sum(), weight)[0])
    assert (grads[0] - grads[1]).norm() / grads[1].norm() < 2e-5


def test_gradients_are_those_of_differences() -> None:
    draw = torch.Generator().manual_seed(0)
    x, y = (torch.randn(2, 3, 2, 6, generator=draw, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight, angles = torch.rand(6, generator=draw).double(), torch.rand(3, 3, generator=draw).double()
    turns = torch.polar(torch.ones_like(angles), angles)[:, None]
    assert torch.autograd.gradcheck(lambda x: _RmsNorm.apply(x, weight, 1e-5), x)
    assert torch.autograd.gradcheck(lambda x: _Rotation.apply(x, turns), x)
    assert torch.autograd.gradcheck(_Swiglu.apply, (x, y))
    assert torch.autograd.gradcheck(_SwigluOfHalves.apply, x)


@pytest.mark.parametrize("family", list(TINY))
def test_checkpointed_blocks_keep_no_more_than_diffusers(family: str) -> None:
    held = []
    for is_lean in (False, True):
        with torch.device("meta"):
            made = network(family, torch.bfloat16)
            made.enable_gradient_checkpointing()
            if is_lean:
                keep_little_of_transformer(made, gradient_checkpointing=True)
            noisy = torch.randn(2, int(TINY[family]["in_channels"]), 8, 8).bfloat16().requires_grad_()
            with counted() as cost:
                found = velocity(family, made.train(), noisy)
                held.append(cost.held_bytes)
                del found
    assert held[1] <= held[0]
