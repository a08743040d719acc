import copy
from typing import Any

import pytest
import torch
from helpers.adapters import LINEAR_TARGETS, UNET_TARGETS, injected, outputs, perturb, trained
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from sdlora.lora.inject import AdapterSpec, find_targets, inject
from sdlora.lora.layers import DoraLayer, LoraLayer, LoraLinear, seeded_dropout


def test_linear_outputs_and_gradients_equal_peft_in_float64(unet: Any) -> None:
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
    ours, other = outputs(unet, torch.float64), outputs(reference, torch.float64)
    assert (ours - other).abs().max() <= 1e-10 * other.abs().max()
    ours.pow(2).sum().backward()
    other.pow(2).sum().backward()
    for path, layer in adapter.layers.items():
        pairs = [(layer.down, theirs[path].lora_A), (layer.up, theirs[path].lora_B)]
        for mine, peft in pairs:
            expected = peft["default"].weight.grad
            assert mine.grad is not None and expected.abs().max() > 0
            assert (mine.grad - expected).abs().max() <= 1e-10 * expected.abs().max()


def in_peft(network: Any, layers: dict[str, LoraLayer], **options: Any) -> dict[str, Any]:
    """PEFT's adapter with our weights in a network, both in float64; its layers by path."""
    config = LoraConfig(r=4, lora_alpha=2.0, target_modules=list(layers), **options)
    inject_adapter_in_model(config, network)
    network.double()
    theirs = {path: network.get_submodule(path) for path in layers}
    with torch.no_grad():
        for path, layer in layers.items():
            layer.double()
            theirs[path].lora_A["default"].weight.copy_(layer.down)
            theirs[path].lora_B["default"].weight.copy_(layer.up)
            if isinstance(layer, DoraLayer):
                theirs[path].lora_magnitude_vector["default"].weight.copy_(layer.magnitude)
    return theirs


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}])
def test_every_unet_target_equals_peft_in_float64(pipeline: Any, options: dict[str, bool]) -> None:
    reference, unet = copy.deepcopy(pipeline.unet).double(), pipeline.unet.double()
    spec = AdapterSpec(rslora="use_rslora" in options, dora="use_dora" in options)
    adapter = injected(pipeline, UNET_TARGETS, spec)
    theirs = in_peft(reference, adapter.layers, **options)
    ours, other = outputs(unet, torch.float64), outputs(reference, torch.float64)
    assert (ours - other).abs().max() <= (1e-7 if spec.rslora else 1e-10) * other.abs().max()  # alpha is a float32
    ours.pow(2).sum().backward()
    other.pow(2).sum().backward()
    for path, layer in adapter.layers.items():
        pairs = [(layer.down, theirs[path].lora_A), (layer.up, theirs[path].lora_B)]
        if isinstance(layer, DoraLayer):
            pairs.append((layer.magnitude, theirs[path].lora_magnitude_vector))
        for mine, peft in pairs:
            expected = peft["default"].weight.grad
            assert mine.grad is not None and expected.abs().max() > 0
            assert (mine.grad - expected).abs().max() <= (1e-6 if spec.rslora else 1e-10) * expected.abs().max()


@pytest.mark.parametrize("dora", [False, True])
def test_text_encoder_equals_peft_in_float64(pipeline: Any, dora: bool) -> None:
    text_encoder = pipeline.text_encoder.double()
    reference = copy.deepcopy(text_encoder)
    adapter = injected(pipeline, ["text_encoder"], AdapterSpec(dora=dora))
    layers = {path.removeprefix("text_encoder."): layer for path, layer in adapter.layers.items()}
    theirs = in_peft(reference, layers, use_dora=dora)
    tokens = torch.arange(77)[None]
    ours, other = text_encoder(tokens).last_hidden_state, reference(tokens).last_hidden_state
    assert (ours - other).abs().max() <= 1e-10 * other.abs().max()
    ours.pow(2).sum().backward()
    other.pow(2).sum().backward()
    for path, layer in layers.items():
        expected = theirs[path].lora_A["default"].weight.grad
        assert layer.down.grad is not None
        assert (layer.down.grad - expected).abs().max() <= 1e-10 * expected.abs().max()


def test_pissa_init_equals_peft(pipeline: Any) -> None:
    reference = copy.deepcopy(pipeline.unet)
    adapter = inject(
        pipeline.unet, find_targets(pipeline.unet, LINEAR_TARGETS), 4, 2.0, seed=1, spec=AdapterSpec(init="pissa")
    )
    config = LoraConfig(r=4, lora_alpha=2.0, target_modules=list(adapter.layers), init_lora_weights="pissa")
    inject_adapter_in_model(config, reference)
    with torch.no_grad():
        for path, layer in adapter.layers.items():
            theirs = reference.get_submodule(path)
            torch.testing.assert_close(
                layer.up @ layer.down, theirs.lora_B["default"].weight @ theirs.lora_A["default"].weight
            )
        perturb(adapter)
        for path, layer in adapter.layers.items():
            theirs = reference.get_submodule(path)
            theirs.lora_A["default"].weight.copy_(layer.down)
            theirs.lora_B["default"].weight.copy_(layer.up)
        torch.testing.assert_close(outputs(pipeline.unet), outputs(reference), atol=1e-4, rtol=1e-4)


STARTED = [AdapterSpec(init="orthogonal"), AdapterSpec(init="pissa"), AdapterSpec(dora=True), AdapterSpec(rslora=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spec", STARTED)
def test_every_kind_starts_at_the_base_and_restores_it(pipeline: Any, spec: AdapterSpec, dtype: torch.dtype) -> None:
    unet = pipeline.unet.to(dtype)
    paths = find_targets(unet, UNET_TARGETS)
    with torch.no_grad():
        before = outputs(unet, dtype)
        adapter = inject(unet, paths, 4, 3.0, seed=0, spec=spec)
        assert torch.equal(outputs(unet, dtype), before)
        perturb(adapter)
        assert not torch.equal(outputs(unet, dtype), before)
        with adapter.disabled():
            assert torch.equal(outputs(unet, dtype), before)
        adapter.remove()
        assert torch.equal(outputs(unet, dtype), before)


def test_dropout_depends_on_the_samples_seed_alone() -> None:
    layer = LoraLinear(nn.Linear(64, 5), 4, 4.0, generator=torch.Generator().manual_seed(0))
    layer.dropout = 0.25
    with torch.no_grad():
        layer.up.normal_(generator=torch.Generator().manual_seed(1))
        x = torch.randn(2, 50, 64, generator=torch.Generator().manual_seed(2))
        plain = layer(x)
        layer.dropout_seeds = (11, 12)
        both = layer(x)
        assert not torch.equal(both, plain)
        assert torch.equal(both, layer(x))
        torch.testing.assert_close(layer(torch.cat([x, x])), torch.cat([both, both]))
        layer.dropout_seeds = (12,)
        torch.testing.assert_close(layer(x[1:]), both[1:])
        layer.dropout_seeds = (13,)
        assert not torch.equal(layer(x[1:]), both[1:])
        dropped = seeded_dropout(torch.ones(1, 1000, 64), 0.25, [13])
        assert dropped.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
        assert float((dropped == 0).float().mean()) == pytest.approx(0.25, abs=0.01)
        layer.dropout_seeds = ()
        assert torch.equal(layer(x), plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_untrained_adapter_equals_the_base_bit_for_bit(unet: Any, dtype: torch.dtype) -> None:
    unet.to(dtype)
    with torch.no_grad():
        before = outputs(unet, dtype)
        adapter = inject(unet, find_targets(unet, LINEAR_TARGETS), 8, 8.0, seed=0)
        after = outputs(unet, dtype)
    assert torch.equal(before, after)
    assert all(parameter.dtype == torch.float32 for parameter in adapter.parameters())


def test_only_adapter_parameters_require_gradients(unet: Any) -> None:
    adapter = trained(unet)
    learning = {id(p) for p in unet.parameters() if p.requires_grad}
    assert learning == {id(p) for p in adapter.parameters()}


def test_down_is_gaussian_with_deviation_one_over_r() -> None:
    layer = LoraLinear(nn.Linear(4000, 10), 8, 8.0, generator=torch.Generator().manual_seed(0))
    assert layer.down.std().item() == pytest.approx(1 / 8, rel=0.02)
    assert abs(layer.down.mean().item()) < 0.002
    assert not layer.up.any()


def test_update_is_alpha_over_r_times_the_product() -> None:
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
