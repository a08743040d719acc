"""Meta base models against real ones."""

from __future__ import annotations

from pathlib import Path

import torch

from sdlora.estimate.meta_model import META, MetaBase, empty_latents, num_bytes, shapes_of_base, shapes_of_family
from sdlora.models.load import load_base


def test_meta_model_has_shapes_and_sizes_of_loaded_base(tiny_base: Path) -> None:
    base = load_base(str(tiny_base), device=torch.device("cpu"), dtype=torch.float32)
    shapes = shapes_of_base(base)
    assert (shapes.latent_factor, shapes.resolution_px) == (base.latent_factor, base.resolution_px)
    assert shapes.frozen_bytes == num_bytes(base.vae, *base.text_encoders)
    made = MetaBase(shapes, torch.float32, text_is_trained=True)
    assert {n: p.shape for n, p in made.unet.named_parameters()} == {
        n: p.shape for n, p in base.unet.named_parameters()
    }
    assert made.text_encoders
    assert made.text(2)["states"].shape == base.encode_captions(["a", "b"])["states"].shape
    noisy = empty_latents(shapes, 2, (32, 40))
    assert noisy.shape == (2, 4, 10, 8)
    found = made.predict(noisy, torch.zeros(2, dtype=torch.long, device=META), made.text(2))
    assert found.shape == noisy.shape
    assert found.device == META


def test_families_text_encoders_have_published_sizes() -> None:
    # CLIP ViT-L's text tower has 123.1 million parameters, OpenCLIP's bigG 694.7 million.
    vae = 83_653_863 * 4
    assert shapes_of_family("sd1").frozen_bytes - vae < 124e6 * 4
    assert abs(shapes_of_family("sdxl").frozen_bytes - vae - (123.1e6 + 693.4e6) * 4) < 4e7
