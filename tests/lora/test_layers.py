import copy
from typing import Any

import pytest
import torch
from adapters import LINEAR_TARGETS, answers, trained
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from sdlora.lora.inject import inject
from sdlora.lora.layers import LoraLinear
from sdlora.lora.targets import find_targets


def test_outputs_and_gradients_equal_pefts_in_float64(unet: Any) -> None:
    reference = copy.deepcopy(unet).double()
    unet.double()
    adapter = trained(unet, rank=4, alpha=2.0)
    for layer in adapter.layers.values():
        layer.double()
    config = LoraConfig(r=4, lora_alpha=2.0, target_modules=list(adapter.layers))
    inject_adapter_in_model(config, reference)
    reference.double()
    theirs = {path: reference.get_submodule(path) for path in adapter.layers}
    with torch.no_grad():
        for path, layer in adapter.layers.items():
            theirs[path].lora_A["default"].weight.copy_(layer.down)
            theirs[path].lora_B["default"].weight.copy_(layer.up)
    ours, other = answers(unet, torch.float64), answers(reference, torch.float64)
    assert (ours - other).abs().max() <= 1e-10 * other.abs().max()
    ours.pow(2).sum().backward()
    other.pow(2).sum().backward()
    for path, layer in adapter.layers.items():
        pairs = [(layer.down, theirs[path].lora_A), (layer.up, theirs[path].lora_B)]
        for mine, peft in pairs:
            expected = peft["default"].weight.grad
            assert mine.grad is not None and expected.abs().max() > 0
            assert (mine.grad - expected).abs().max() <= 1e-10 * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_step_zero_is_the_base_bit_for_bit(unet: Any, dtype: torch.dtype) -> None:
    unet.to(dtype)
    with torch.no_grad():
        before = answers(unet, dtype)
        adapter = inject(unet, find_targets(unet, LINEAR_TARGETS), 8, 8.0, seed=0)
        after = answers(unet, dtype)
    assert torch.equal(before, after)
    assert all(parameter.dtype == torch.float32 for parameter in adapter.parameters())


def test_only_the_adapter_learns(unet: Any) -> None:
    adapter = trained(unet)
    learning = {id(p) for p in unet.parameters() if p.requires_grad}
    assert learning == {id(p) for p in adapter.parameters()}


def test_down_is_gaussian_with_deviation_one_over_r() -> None:
    layer = LoraLinear(nn.Linear(4000, 10), 8, 8.0, generator=torch.Generator().manual_seed(0))
    assert layer.down.std().item() == pytest.approx(1 / 8, rel=0.02)
    assert abs(layer.down.mean().item()) < 0.002
    assert not layer.up.any()


def test_the_update_is_alpha_over_r_times_the_product() -> None:
    layer = LoraLinear(nn.Linear(6, 5, bias=False), 2, 3.0, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        layer.up.normal_(generator=torch.Generator().manual_seed(1))
        x = torch.randn(7, 6, generator=torch.Generator().manual_seed(2))
        merged = layer.base.weight + 1.5 * layer.up @ layer.down
        torch.testing.assert_close(layer(x), x @ merged.T)
        layer.strength = 0.5
        torch.testing.assert_close(layer(x), x @ (layer.base.weight + 0.75 * layer.up @ layer.down).T)
        layer.enabled = False
        assert torch.equal(layer(x), layer.base(x))
