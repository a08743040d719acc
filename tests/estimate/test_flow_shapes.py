"""Estimates of flow-matching transformers at their true shapes, against published figures."""

from __future__ import annotations

import pytest
import torch

from sdlora.common.families import Family
from sdlora.config.toml import parse_config
from sdlora.estimate.memory import MemoryInputs, estimate_memory
from sdlora.estimate.meta_model import shapes_of_family
from sdlora.run.arguments import adapter_spec


@pytest.mark.parametrize(
    ("targets", "trained"),
    [(["attention"], 7.4e6), (["attention", "mlp"], 17.5e6)],
    ids=["attention", "attention and MLP"],
)
def test_z_image_has_its_parameters(targets: list[str], trained: float) -> None:
    document = {"data": {"folder": "x"}, "lora": {"targets": targets}, "train": {"gradient_checkpointing": True}}
    config = parse_config(document, name="x")
    shapes = shapes_of_family("z-image")
    found = estimate_memory(MemoryInputs(config, adapter_spec(config), shapes, torch.bfloat16, (512, 512)))
    assert found.base_parameters == pytest.approx(6.155e9, rel=1e-3)
    assert found.trainable_parameters == pytest.approx(trained, rel=0.01)
    assert found.parts["weights"] == pytest.approx(11.46 * 2**30, rel=0.01)
    assert shapes.text_bytes / 2 == pytest.approx(4.02e9, rel=0.01)
    # A checkpointed step takes three forward passes and a little less, for frozen weights have no gradients.
    assert 2.5 < found.flops_per_step / found.flops_per_prediction < 3.1


@pytest.mark.parametrize(
    ("family", "targets", "parameters", "trained", "weights_gib", "text"),
    [
        ("flux2-klein-4b", ["attention"], 3.876e9, 9.3e6, 7.22, 4.02e9),
        ("flux2-klein-4b", ["attention", "mlp"], 3.876e9, 12.0e6, 7.22, 4.02e9),
        ("flux2-klein-9b", ["attention"], 9.079e9, 16.0e6, 16.91, 7.57e9),
    ],
)
def test_klein_has_its_parameters(
    family: Family, targets: list[str], parameters: float, trained: float, weights_gib: float, text: float
) -> None:
    document = {"data": {"folder": "x"}, "lora": {"targets": targets}, "train": {"gradient_checkpointing": True}}
    config = parse_config(document, name="x")
    shapes = shapes_of_family(family)
    found = estimate_memory(MemoryInputs(config, adapter_spec(config), shapes, torch.bfloat16, (512, 512)))
    assert found.base_parameters == pytest.approx(parameters, rel=1e-3)
    assert found.trainable_parameters == pytest.approx(trained, rel=0.01)
    assert found.parts["weights"] == pytest.approx(weights_gib * 2**30, rel=0.01)
    assert shapes.text_bytes / 2 == pytest.approx(text, rel=0.01)
    assert shapes.vae_bytes / 4 == pytest.approx(84e6, rel=0.01)
    # 1024 patches at 512 px, 512 tokens: a block's layers have 13 d^2 weights for each, and all attend to all.
    width, blocks = {"4b": (3072, 25), "9b": (4096, 32)}[family[-2:]]
    flops = blocks * (2 * 13 * width**2 * 1536 + 4 * 1536**2 * width)
    assert found.flops_per_prediction == pytest.approx(flops, rel=0.01)


@pytest.mark.parametrize(
    ("family", "most_gib", "transferred_gib"), [("z-image", 5.0, 22.6), ("flux2-klein-4b", 5.5, 13.7)]
)
def test_a_transformer_trains_in_a_small_memory_whose_blocks_wait_on_the_host(
    family: Family, most_gib: float, transferred_gib: float
) -> None:
    document = {
        "data": {"folder": "x"}, "lora": {"targets": ["attention"]}, "base": {"offload": "blocks"},
        "train": {"gradient_checkpointing": True},
    }  # fmt: skip
    config = parse_config(document, name="x")
    inputs = MemoryInputs(config, adapter_spec(config), shapes_of_family(family), torch.bfloat16, (1024, 1024))
    found = estimate_memory(inputs)
    assert found.peak_bytes < most_gib * 2**30
    # Forward and backward.
    assert found.transferred_bytes == pytest.approx(transferred_gib * 2**30, rel=0.02)
