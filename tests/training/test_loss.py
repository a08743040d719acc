"""The objective against what is written out by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sdlora.lora.inject import inject
from sdlora.lora.targets import find_targets
from sdlora.models.load import load_base
from sdlora.training.loss import Batch, diffusion_loss, diffusion_loss_with_prior


def test_one_pass_gives_the_loss_and_the_distance_from_the_base(tiny_base: Path) -> None:
    base = load_base(str(tiny_base), device=torch.device("cpu"), dtype=torch.float32)
    adapter = inject(base.unet, find_targets(base.unet, ["cross_attention"]), 2, 2.0, 0)
    draw = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 3, 4, 8, 8, generator=draw)
    batch = Batch(latents, noise, torch.tensor([10, 400, 950]), base.encode_captions(["a", "b", "c"]))
    class_text = base.encode_captions(["cat", "", "dog"])
    with torch.no_grad():
        everyone = torch.arange(3)
        unmoved = diffusion_loss_with_prior(base, adapter, batch, everyone, class_text, class_text)[1]
        assert unmoved.max() < 1e-12, "B is zero, and twice the batch rounds a little differently"
        for parameter in adapter.up_parameters():
            parameter.normal_(generator=draw)
        loss, distance = diffusion_loss_with_prior(base, adapter, batch, everyone, class_text, class_text)
        some = torch.tensor([2, 0])
        their_text = {name: states[some] for name, states in class_text.items()}
        fewer = diffusion_loss_with_prior(base, adapter, batch, some, their_text, their_text)
        alpha = base.alphas_cumprod[batch.timesteps].view(-1, 1, 1, 1)
        noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
        moved = base.unet(noisy, batch.timesteps, class_text["states"]).sample
        adapter.set_strength(0.0)
        kept = base.unet(noisy, batch.timesteps, class_text["states"]).sample
        adapter.set_strength(1.0)
    torch.testing.assert_close(distance, (moved - kept).pow(2).mean(dim=(1, 2, 3)))
    torch.testing.assert_close(loss, diffusion_loss(base, batch))
    torch.testing.assert_close(fewer, (loss, distance[some]))
    assert loss.min() > 0


def test_another_error_is_used(tiny_base: Path) -> None:
    base = load_base(str(tiny_base), device=torch.device("cpu"), dtype=torch.float32)
    batch = Batch(torch.zeros(2, 4, 8, 8), torch.ones(2, 4, 8, 8), torch.tensor([5, 6]), base.encode_captions(["", ""]))
    with torch.no_grad():
        found = diffusion_loss(base, batch, lambda predicted, target, _: (predicted - target).abs().amax(dim=(1, 2, 3)))
        answer = base.unet((1 - base.alphas_cumprod[[5, 6]]).sqrt().view(-1, 1, 1, 1) * batch.noise, batch.timesteps,
                           batch.text["states"]).sample  # fmt: skip
    assert found.tolist() == pytest.approx((answer - 1).abs().amax(dim=(1, 2, 3)).tolist(), rel=1e-5)
