"""Packed weights against their formulas, and packed layers against torch's own with the same weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from counts import saved_for_backward
from helpers.adapters import UNET_TARGETS, perturb, small_unet
from torch import Tensor, nn

from sdlora.estimate.meta_model import counted
from sdlora.lora.fused import SharedInput
from sdlora.lora.inject import Adapter, AdapterSpec, find_targets, inject
from sdlora.lora.layers import LoraLinear
from sdlora.lora.quantize import (
    TYPICAL_ERRORS,
    Packed,
    Quantization,
    QuantizedLinear,
    num_weights,
    packing_error,
    packing_errors,
    quantize_linears,
)
from sdlora.training.model import TrainingModel
from sdlora.training.optimizers import Group

KINDS: list[Quantization] = ["int8", "fp8", "nf4"]
# Table of the paper's appendix E.
NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip


@pytest.fixture
def weight() -> Tensor:
    weight = torch.randn(48, 128, generator=torch.Generator().manual_seed(0))
    weight[5] = 0
    weight[7, :64] = 0
    return weight


def test_int8_is_the_nearest_of_255_multiples(weight: Tensor) -> None:
    packed = Packed.of(weight, "int8")
    step = weight.double().abs().amax(dim=1, keepdim=True) / 127
    assert (packed.dense().double() - weight.double()).abs().le(step / 2 * (1 + 1e-5)).all()
    assert packed.codes.dtype == torch.int8
    assert packed.codes.abs().amax(dim=1).eq(127).sum() == 47
    assert packed.dense()[5].eq(0).all()


def test_fp8_is_the_nearest_float_of_4_and_3_bits(weight: Tensor) -> None:
    packed = Packed.of(weight, "fp8")
    # All finite values of E4M3 (Micikevicius et al. 2209.05433, table 1): 1.mmm times 2^(e - 7), and 0.mmm times 2^-6.
    powers = [(m / 8, -6) if e == 0 else (1 + m / 8, e - 7) for e in range(16) for m in range(8)][:-1]
    levels = torch.tensor([m * 2.0**e for m, e in powers], dtype=torch.float64)
    assert levels.max() == 448
    scaled = weight.double() / (weight.double().abs().amax(dim=1, keepdim=True) / 448).clamp(min=1e-30)
    nearest = (scaled.abs().unsqueeze(2) - levels).abs().amin(dim=2)
    scales = weight.double().abs().amax(dim=1, keepdim=True) / 448
    error = (packed.dense().double() - weight.double()).abs()
    torch.testing.assert_close(error, nearest * scales, rtol=0, atol=1e-6)
    assert packed.codes.nbytes == weight.numel()
    assert packed.dense()[5].eq(0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_packing_error_of_normal_and_heavy_tailed_weights(kind: Quantization) -> None:
    draw = torch.Generator().manual_seed(0)
    gaussian = torch.randn(256, 2048, generator=draw)
    tails = torch.randn(256, 2048, generator=draw) / (torch.randn(3, 256, 2048, generator=draw) ** 2).mean(0).sqrt()
    for weight, expected in zip((gaussian, tails), TYPICAL_ERRORS[kind], strict=True):
        x = torch.randn(512, 2048, generator=draw)
        moved = (x @ (Packed.of(weight, kind).dense() - weight).T).norm() / (x @ weight.T).norm()
        found = packing_error(weight, kind)
        assert found == pytest.approx(moved.item(), rel=0.02)
        assert found == pytest.approx(expected, rel=0.1)


def test_packing_error_of_a_network_is_measured_before_and_after_packing(unet: Any) -> None:
    plain = copy.deepcopy(unet)
    expected = packing_errors(plain, ".attentions.", KINDS)
    assert list(expected) == KINDS
    for kind in KINDS:
        packed = copy.deepcopy(unet)
        quantize_linears(packed, kind)
        assert packing_errors(packed, ".attentions.", KINDS) == {kind: expected[kind]}
    adapter = inject(plain, find_targets(plain, ["cross_attention"]), 2, 2.0, 0)
    assert packing_errors(plain, ".attentions.", ["int8"]) == {"int8": expected["int8"]}
    adapter.remove()


def test_nf4_is_the_nearest_of_16_levels_of_each_64(weight: Tensor) -> None:
    packed = Packed.of(weight, "nf4")
    levels = torch.tensor(NF4, dtype=torch.float64)
    blocks = weight.double().view(-1, 64)
    largest = blocks.abs().amax(dim=1, keepdim=True)
    candidates = (largest.unsqueeze(2) * levels).expand(-1, 64, -1)
    nearest = (candidates - blocks.unsqueeze(2)).abs().amin(dim=2)
    error = (packed.dense().double().view(-1, 64) - blocks).abs()
    torch.testing.assert_close(error, nearest, rtol=0, atol=1e-6)
    assert packed.codes.nbytes == weight.numel() // 2


def test_nf4_equals_bitsandbytes(weight: Tensor) -> None:
    library: Any = pytest.importorskip("bitsandbytes.functional")
    codes, state = library.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    packed = Packed.of(weight, "nf4")
    assert torch.equal(packed.codes.flatten(), codes.flatten())
    torch.testing.assert_close(packed.dense(), library.dequantize_4bit(codes, state), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_unpacked_weight_has_its_dtype(weight: Tensor, kind: Quantization, dtype: torch.dtype) -> None:
    exact = Packed.of(weight.to(dtype).float(), kind).dense()
    found = Packed.of(weight.to(dtype), kind).dense()
    assert found.dtype == dtype
    assert torch.equal(found, exact.to(dtype))


@pytest.mark.parametrize("kind", KINDS)
def test_injection_unpacks_no_weight(unet: Any, kind: Quantization, monkeypatch: pytest.MonkeyPatch) -> None:
    packed, _ = both(unet, kind)
    monkeypatch.setattr(Packed, "dense", None)
    adapter = inject(packed, find_targets(packed, ["self_attention", "cross_attention"]), 4, 6.0, 0)
    step = TrainingModel(
        packed, adapter, [Group(adapter.parameters(), 1.0)], optimizer="adamw", gradient_checkpointing=False
    )
    with step.forward_backward():
        assert {len(layer.shared.members) for layer in adapter.layers.values() if layer.shared} >= {3}


@pytest.mark.parametrize("kind", KINDS)
def test_layers_on_one_input_keep_views_of_one_packed_weight(weight: Tensor, kind: Quantization) -> None:
    layers = []
    for own in (weight, weight.flip(0)):
        linear = nn.Linear(128, 48, bias=False)
        linear.weight.data = own
        layers.append(QuantizedLinear(linear, kind))
    before = [layer.weight for layer in layers]
    whole = SharedInput([LoraLinear(layer, 2, 1.0) for layer in layers]).weight
    assert isinstance(whole, Packed)
    assert torch.equal(whole.dense(), torch.cat(before))
    for layer, own in zip(layers, before, strict=True):
        assert torch.equal(layer.weight, own)
        assert layer.codes.untyped_storage().data_ptr() == whole.codes.untyped_storage().data_ptr()


@pytest.mark.parametrize("kind", KINDS)
def test_layer_equals_torchs_and_keeps_no_unpacked_weight(weight: Tensor, kind: Quantization) -> None:
    layer = nn.Linear(128, 48).requires_grad_(False)
    layer.weight.copy_(weight)
    packed = QuantizedLinear(layer, kind)
    layer.weight.copy_(packed.weight)
    x = torch.randn(3, 5, 128)
    own, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    with saved_for_backward(packed) as kept, counted() as cost:
        output = packed(own)
    assert kept.held_bytes == 0
    assert cost.held_bytes == output.nbytes
    expected = layer(other)
    assert torch.equal(output, expected)
    output.sin().sum().backward()
    expected.sin().sum().backward()
    torch.testing.assert_close(own.grad, other.grad)


@pytest.mark.parametrize("kind", KINDS)
def test_dtype_change_leaves_scales_in_float32(weight: Tensor, kind: Quantization) -> None:
    layer = nn.Linear(128, 48)
    layer.weight.data = weight
    packed = QuantizedLinear(layer, kind)
    exact = packed.weight.clone()
    packed.to("cpu", torch.bfloat16)
    assert packed.scales.dtype == torch.float32
    assert packed.bias.dtype == torch.bfloat16
    assert torch.equal(packed.weight, exact.bfloat16())
    assert packed(torch.randn(2, 128).bfloat16()).dtype == torch.bfloat16
    assert torch.equal(packed.to("cpu").weight, exact.bfloat16())
    assert torch.equal(packed.float().weight, exact)
    assert packed.to("meta").weight.is_meta


# --- In a UNet -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unet() -> Any:
    return small_unet(sample_size=8, use_linear_projection=True)


def both(unet: Any, kind: Quantization) -> tuple[Any, Any]:
    """The UNet with packed weights, and one of torch's own layers with the same weights."""
    packed, plain = copy.deepcopy(unet), copy.deepcopy(unet)
    quantize_linears(packed, kind)
    for path, module in packed.named_modules():
        if isinstance(module, QuantizedLinear):
            plain.get_submodule(path).weight.data = module.weight
    return packed, plain


def gradients(
    unet: Any, targets: list[str], spec: AdapterSpec | None, checkpointing: bool
) -> tuple[Adapter, list[Tensor]]:
    adapter = inject(unet, find_targets(unet, targets), 4, 6.0, 0, spec=spec)
    perturb(adapter)
    step = TrainingModel(
        unet, adapter, [Group(adapter.parameters(), 1.0)], optimizer="adamw", gradient_checkpointing=checkpointing
    )
    draw = torch.Generator().manual_seed(1)
    x, text = torch.randn(2, 4, 8, 8, generator=draw), torch.randn(2, 7, 48, generator=draw)
    unet.train()  # diffusers computes blocks again in training alone
    with step.forward_backward():
        unet(x, torch.tensor([20, 900]), text).sample.square().mean().backward()
    return adapter, step.by_layer([p.grad for p in step.parameters() if p.grad is not None])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("targets", "spec", "checkpointing"),
    [
        (["cross_attention"], None, False),
        (["cross_attention", "self_attention"], None, True),
        (UNET_TARGETS, None, False),
        (["cross_attention", "self_attention"], AdapterSpec(dora=True), False),
        (["cross_attention", "self_attention"], AdapterSpec(init="pissa"), False),
    ],
)
def test_training_equals_that_on_the_unpacked_base(
    unet: Any, kind: Quantization, targets: list[str], spec: AdapterSpec | None, checkpointing: bool
) -> None:
    packed, plain = both(unet, kind)
    adapter, found = gradients(packed, targets, spec, checkpointing)
    reference, expected = gradients(plain, targets, spec, checkpointing)
    assert list(adapter.layers) == list(reference.layers)
    assert adapter.num_base_parameters() == reference.num_base_parameters()
    for own, other in zip(found, expected, strict=True):
        assert ((own - other).norm() / other.norm()).item() <= 1e-5


def test_packed_base_serves_another_run_afterwards(unet: Any) -> None:
    packed, _ = both(unet, "int8")
    before = {name: value.clone() for name, value in packed.state_dict().items()}
    adapter, first = gradients(packed, ["self_attention", "cross_attention"], None, False)
    adapter.remove()
    after = packed.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    _, second = gradients(packed, ["self_attention", "cross_attention"], None, False)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_only_attention_blocks_are_packed(unet: Any, kind: Quantization) -> None:
    packed, plain = both(unet, kind)
    linear = {path: m for path, m in plain.named_modules() if isinstance(m, nn.Linear)}
    found = {path for path, module in packed.named_modules() if isinstance(module, QuantizedLinear)}
    expected = {
        path for path, m in linear.items() if "attentions." in path and (kind != "nf4" or m.in_features % 64 == 0)
    }
    assert found == expected != set()
    assert num_weights(packed) == num_weights(plain) == sum(p.numel() for p in plain.parameters())
