"""A training step at the true shapes of Stable Diffusion 1.5, with random weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from interop import true_pipeline

from sdlora.common import seeds
from sdlora.lora.inject import find_targets, inject
from sdlora.models.base import Source, TextOptions
from sdlora.models.sd import StableDiffusion
from sdlora.training.loss import Batch, diffusion_loss

NUM_PARAMETERS = 859_520_964


def no_reload() -> Any:
    raise AssertionError("nothing is exported here")


@pytest.mark.slow
def test_one_step_of_stable_diffusion_15_at_256_px_in_bf16() -> None:
    source = Source(true_pipeline("sd1"), "random", None, no_reload)
    assert sum(p.numel() for p in source.pipeline.unet.parameters()) == NUM_PARAMETERS
    base = StableDiffusion(source, device=torch.device("cpu"), dtype=torch.bfloat16, text=TextOptions())
    assert (base.resolution_px, base.latent_factor) == (512, 8)
    adapter = inject(base.network, find_targets(base.network, ["cross_attention"]), 8, 8.0, seed=0)
    assert len(adapter.layers) == 64
    pixels = seeds.normal((1, 3, 256, 256), 0, "pixels").clamp(-1, 1)
    moments = base.encode_pixels(pixels)
    assert moments.shape == (1, 8, 32, 32)
    with torch.no_grad():
        text = base.encode_captions(["a cat"])
    latents, noise = (seeds.normal((1, 4, 32, 32), 0, name) for name in ("latents", "noise"))
    batch = Batch(base.sample_latents(moments, latents), noise, torch.tensor([500]), text)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-3)
    losses = []
    for _ in range(2):
        loss = diffusion_loss(base, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert torch.isfinite(torch.tensor(losses)).all()
    assert losses[1] < losses[0]
    assert all(bool(layer.up.any()) and layer.up.dtype == torch.float32 for layer in adapter.layers.values())
