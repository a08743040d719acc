"""Meta base models against real ones."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from counts import saved_for_backward
from torch import nn

from sdlora.estimate.meta_model import (
    META,
    MetaBase,
    counted,
    empty_latents,
    meta_attention,
    num_bytes,
    shapes_of_base,
    shapes_of_family,
)
from sdlora.models.load import load_base


def test_meta_model_has_shapes_and_sizes_of_loaded_base(tiny_base: Path) -> None:
    base = load_base(str(tiny_base), device=torch.device("cpu"), dtype=torch.float32)
    shapes = shapes_of_base(base)
    assert (shapes.latent_factor, shapes.resolution_px) == (base.latent_factor, base.resolution_px)
    assert shapes.frozen_bytes == num_bytes(base.vae, *base.text_encoders)
    made = MetaBase(shapes, torch.float32, text_is_trained=True)
    assert {n: p.shape for n, p in made.network.named_parameters()} == {
        n: p.shape for n, p in base.network.named_parameters()
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


def test_linear_layer_costs_formula_flops_and_bytes() -> None:
    layer, x = nn.Linear(30, 50, device=META).requires_grad_(False), torch.empty(7, 30, device=META)
    with counted() as forward:
        layer(x)
    assert forward.flops == 2 * 7 * 30 * 50
    assert forward.peak_bytes == 4 * 7 * 50
    with counted() as both:
        layer(x.requires_grad_()).view(-1).unsqueeze(0).sum().backward()
    assert both.flops == 2 * forward.flops


def test_freed_storage_is_no_longer_held() -> None:
    x = torch.empty(1000, device=META)
    with counted() as cost:
        for _ in range(5):
            y = x + 1
            y = y.view(10, 100)[2:]
        assert cost.held_bytes == 4000
        # The new tensor is made while the old one is still there.
        assert cost.peak_bytes == 8000
        del y
        assert cost.held_bytes == 0


def test_repeated_operations_cost_the_same_each_time() -> None:
    x, ones = torch.empty(6, 8, device=META), torch.empty(8, 8, device=META)
    costs = []
    with counted() as cost:
        for _ in range(3):
            before = cost.held_bytes, cost.flops
            made = F.layer_norm(x @ ones, (8,))
            parts = torch.ops.aten._unsafe_view(made, [48]), made.split(2), made.mul_(2)
            costs.append((cost.held_bytes - before[0], cost.flops - before[1]))
            assert parts[0].untyped_storage() == parts[1][0].untyped_storage() == parts[2].untyped_storage()
            assert parts[2] is made and made.shape == (6, 8)
            del made, parts
    # Means and deviations go with their operation; what is left is the normalized product.
    assert costs == [(4 * 48, 2 * 6 * 8 * 8)] * 3


def test_real_and_meta_tensors_cost_the_same() -> None:
    def step(device: str) -> tuple[int, int]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(4, 8, 3), nn.SiLU(), nn.Conv2d(8, 4, 3)).to(device)
        with counted() as cost:
            net(torch.ones(2, 4, 16, 16, device=device)).square().mean().backward()
        return cost.flops, cost.held_bytes

    assert step("cpu") == step("meta")


def test_attention_holds_no_scores_and_counts_four_products_backward() -> None:
    q = torch.empty(1, 2, 64, 8, device=META, requires_grad=True)
    with counted() as cost:
        F.scaled_dot_product_attention(q, q, q)
    assert cost.flops == 2 * (2 * 2 * 64 * 64 * 8)
    assert cost.peak_bytes < 4 * 2 * 64 * 64
    with counted() as both:
        F.scaled_dot_product_attention(q, q, q).sum().backward()
    assert both.flops == 3 * cost.flops
    before = F.scaled_dot_product_attention
    with meta_attention():
        assert F.scaled_dot_product_attention is not before
    assert F.scaled_dot_product_attention is before


def test_saved_tensors_are_counted_once_without_weights() -> None:
    layer, x = nn.Linear(10, 10), torch.ones(5, 10, requires_grad=True)
    with saved_for_backward(layer) as saved:
        (layer(x) + layer(x)).sum()
    assert saved.held_bytes == 4 * 5 * 10
