"""Adapters with weights that are not zero, and a network's answers to fixed inputs."""

from __future__ import annotations

from typing import Any

import torch

from sdlora.lora.inject import Adapter, inject
from sdlora.lora.targets import TARGETS, find_targets


def trained(unet: Any, rank: int = 4, alpha: float = 2.0) -> Adapter:
    """An adapter on every target with weights that are not zero."""
    adapter = inject(unet, find_targets(unet, list(TARGETS)), rank, alpha, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in adapter.up_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return adapter


def answers(unet: Any, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(4)
    latents = torch.randn(2, 4, 8, 8, generator=generator, dtype=torch.float64).to(dtype)
    text = torch.randn(2, 77, 16, generator=generator, dtype=torch.float64).to(dtype)
    found: torch.Tensor = unet(latents, torch.tensor([10, 700]), text, return_dict=False)[0]
    return found
