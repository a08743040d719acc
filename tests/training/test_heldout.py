from pathlib import Path

import torch
from test_loop import make_trainer

from sdlora import seeds
from sdlora.training.heldout import heldout_loss


def test_it_is_the_mean_over_fixed_levels_and_fixed_noise(tiny_base: Path, pictures: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tiny_base, pictures, tmp_path)
    data, base = trainer.data, trainer.base
    expected = []
    for index, example in enumerate(data.dataset.examples):
        latents = data.moments(index)[:4] * base.vae.config.scaling_factor  # type: ignore[attr-defined]
        for level in (62, 187, 312, 437, 562, 687, 812, 937):
            noise = seeds.normal((4, 8, 8), 3, "heldout noise", example.name, level)
            alpha = base.alphas_cumprod[level]
            noisy = (alpha.sqrt() * latents + (1 - alpha).sqrt() * noise).unsqueeze(0)
            with torch.no_grad():
                states = base.encode_captions([example.caption])["states"]
                answer = base.unet(noisy, torch.tensor([level]), states).sample
            expected.append(float((answer - noise).pow(2).mean()))
    found = heldout_loss(data, 3)
    assert abs(found - sum(expected) / len(expected)) < 1e-5
    assert heldout_loss(data, 3) == found != heldout_loss(data, 4)
