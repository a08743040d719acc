"""Adapters with weights that are not zero, and a network's outputs for fixed inputs."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UNet2DConditionModel

from sdlora.lora.inject import Adapter, AdapterSpec, find_targets, inject

LINEAR_TARGETS = ["cross_attention", "self_attention", "mlp"]
UNET_TARGETS = [*LINEAR_TARGETS, "projection", "conv"]


def small_unet(**changes: Any) -> Any:
    """A UNet of random weights, with transformer blocks at its highest resolution only."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "sample_size": 16, "block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "cross_attention_dim": 48, "attention_head_dim": 4,
    }  # fmt: skip
    return UNet2DConditionModel(**{**shape, **changes}).eval()


def trained(unet: Any, rank: int = 4, alpha: float = 2.0) -> Adapter:
    """An adapter on every linear layer of the transformer blocks with weights that are not zero."""
    adapter = inject(unet, find_targets(unet, LINEAR_TARGETS), rank, alpha, seed=1)
    perturb(adapter)
    return adapter


def injected(pipeline: Any, targets: list[str], spec: AdapterSpec, rank: int = 4, alpha: float = 2.0) -> Adapter:
    """An adapter of any kind in a pipeline, with perturbed weights."""
    paths = find_targets(pipeline.unet, targets, [pipeline.text_encoder])
    adapter = inject(pipeline.unet, paths, rank, alpha, seed=1, spec=spec, text_encoders=[pipeline.text_encoder])
    perturb(adapter)
    return adapter


def perturb(adapter: Adapter) -> None:
    """Add random numbers to B and to DoRA's magnitudes."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in [*adapter.up_parameters(), *adapter.magnitude_parameters()]:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)


def outputs(unet: Any, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(4)
    latents = torch.randn(2, 4, 8, 8, generator=generator, dtype=torch.float64).to(dtype)
    text = torch.randn(2, 77, 16, generator=generator, dtype=torch.float64).to(dtype)
    found: torch.Tensor = unet(latents, torch.tensor([10, 700]), text, return_dict=False)[0]
    return found
