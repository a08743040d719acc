"""Estimates of flow-matching transformers at their true shapes, against published figures."""

from __future__ import annotations

import pytest
import torch

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
