"""Memory estimates against known counts, and against what real networks hold."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from helpers.shapes import SMALL, memory_inputs
from torch import nn

from sdlora.config.schema import RunConfig
from sdlora.config.toml import parse_config
from sdlora.estimate import memory
from sdlora.estimate.costs import comparison_cost
from sdlora.estimate.memory import MemoryEstimate, MemoryInputs, estimate_memory
from sdlora.estimate.meta_model import MetaBase, num_bytes, shapes_of_family
from sdlora.lora.inject import AdapterSpec, find_targets, inject
from sdlora.training.optimizers import Group, make_optimizer

CROSS = ["cross_attention"]
BOTH = ["cross_attention", "self_attention"]
ALL = ["cross_attention", "self_attention", "mlp"]


def config_of_text() -> RunConfig:
    document = {"data": {"folder": "x"}, "lora": {"targets": ["text_encoder"]}, "preview": {"enabled": False}}
    return parse_config(document, name="x")


@pytest.mark.parametrize(
    ("family", "counts"), [("sd1", (795_648, 1_594_368, 2_992_128)), ("sdxl", (6_287_360, 11_612_160, 20_930_560))]
)
def test_families_have_known_numbers_of_trained_parameters(family: Any, counts: tuple[int, ...]) -> None:
    base = MetaBase(shapes_of_family(family), torch.bfloat16)
    for targets, count in zip((CROSS, BOTH, ALL), counts, strict=True):
        adapter = inject(base.network, find_targets(base.network, targets), 8, 8.0, 0)
        assert adapter.num_parameters() == count
        adapter.remove()


def test_largest_layer_counts_its_own_and_its_adapters_parameters() -> None:
    wide = {**SMALL.network, "cross_attention_dim": 4096}
    document = {"data": {"folder": "x"}, "lora": {"rank": 8}, "preview": {"enabled": False}}
    asked = parse_config(document, name="x")
    found = estimate_memory(MemoryInputs(asked, AdapterSpec(), replace(SMALL, network=wide), torch.float32, (64, 64)))
    # Keys of the middle block, 64 channels from text of 4096: A is (8, 4096), B is (64, 8).
    assert found.largest_layer == (4096 * 64, 8 * (4096 + 64))


def test_full_fine_tuning_takes_16_bytes_per_parameter() -> None:
    found = replace(estimate_memory(memory_inputs()), base_parameters=8_000_000_000)
    assert found.full_training_bytes == 128_000_000_000


def test_stable_diffusion_step_costs_formula_flops() -> None:
    """F + (F_conv + F_linear + 2 F_attention - what lies below the first adapter) + 6 n r (i + o)."""
    shapes = shapes_of_family("sd1")
    asked = parse_config({"data": {"folder": "x"}, "lora": {"targets": BOTH}, "preview": {"enabled": False}}, name="x")
    found = estimate_memory(MemoryInputs(asked, AdapterSpec(), shapes, torch.bfloat16, (512, 512)))
    assert found.trainable_parameters == 1_594_368
    assert found.base_parameters == 859_520_964
    assert found.flops_per_step == pytest.approx(1718e9, rel=0.005)


@pytest.mark.parametrize("optimizer", ["adamw", "prodigy", "lion", "schedule_free", "adafactor"])
def test_optimizer_state_has_estimated_size(optimizer: str) -> None:
    parameter = nn.Parameter(torch.randn(64, 64))
    made = make_optimizer(optimizer, [Group([parameter], 1.0)], learning_rate=0.5)
    parameter.grad = torch.randn(64, 64)
    made.step()
    values = [v for state in made.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    held = sum(value.nbytes for value in values) / parameter.numel()
    assert held == pytest.approx(memory.OPTIMIZER_BYTES[optimizer], abs=1.0)


def test_parts_are_bytes_of_real_networks() -> None:
    found = estimate_memory(replace(memory_inputs(), on_cpu=True))
    unet = UNet2DConditionModel.from_config(dict(SMALL.network))
    assert found.parts["weights"] == num_bytes(unet) + 1000
    assert found.parts["adapter"] == 16 * found.trainable_parameters
    assert found.peak_bytes == sum(found.parts.values())
    half = replace(memory_inputs(torch.bfloat16), on_cpu=True)
    assert estimate_memory(half).parts["weights"] == num_bytes(unet) // 2 + 1000
    assert estimate_memory(memory_inputs(ema_decay=0.9)).parts["adapter"] == 20 * found.trainable_parameters


def test_networks_that_take_turns_count_only_while_on_the_device() -> None:
    unet = num_bytes(UNet2DConditionModel.from_config(dict(SMALL.network)))
    turns = memory_inputs()
    assert estimate_memory(turns).parts["weights"] == unet
    assert estimate_memory(turns).parts["previews"] == 0
    assert estimate_memory(replace(turns, text_is_live=True)).parts["weights"] == unet + 600
    assert estimate_memory(replace(turns, config=config_of_text())).parts["weights"] == unet + 600
    together = estimate_memory(replace(turns, on_cpu=True))
    assert together.peak_bytes - together.parts["previews"] - estimate_memory(turns).peak_bytes == 1000
    # As large as nothing else in the run: then the larger one alone decides, whether text is kept or not.
    for vae, text in ((10**9, 3 * 10**9), (3 * 10**9, 10**9)):
        large = replace(turns, shapes=replace(SMALL, vae_bytes=vae, text_bytes=text))
        for live in (False, True):
            found = estimate_memory(replace(large, text_is_live=live))
            held = found.peak_bytes - unet - found.parts["adapter"] - found.parts["overhead"]
            assert held == pytest.approx(3e9, rel=0.01)
        found = estimate_memory(replace(large, config=config_of_text()))
        assert found.peak_bytes - unet == pytest.approx(4e9, rel=0.01)


def test_activations_grow_with_batch_and_shrink_with_checkpointing() -> None:
    one, two = (estimate_memory(memory_inputs(batch_size=size)) for size in (1, 2))
    assert two.parts["activations"] == pytest.approx(2 * one.parts["activations"], rel=0.1)
    assert two.flops_per_step == pytest.approx(2 * one.flops_per_step, rel=0.01)
    less = estimate_memory(memory_inputs(batch_size=2, gradient_checkpointing=True))
    assert less.parts["activations"] < 0.7 * two.parts["activations"]
    assert 1.2 < less.flops_per_step / two.flops_per_step < 1.6


def test_quantized_weights_take_one_byte_or_little_more_than_half() -> None:
    wide = {**SMALL.network, "block_out_channels": (64, 128), "cross_attention_dim": 64}
    whole = replace(memory_inputs(), shapes=replace(SMALL, network=wide))

    def packed(kind: str) -> MemoryEstimate:
        base = whole.config.base.model_copy(update={"quantization": kind})
        return estimate_memory(replace(whole, config=whole.config.model_copy(update={"base": base})))

    found = {kind: packed(kind) for kind in ("none", "int8", "fp8", "nf4")}
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(wide)
    linear = [m for path, m in unet.named_modules() if "attentions." in path and isinstance(m, torch.nn.Linear)]
    count = sum(m.weight.numel() for m in linear)
    rows = sum(m.out_features for m in linear)
    assert all(m.in_features % 64 == 0 for m in linear)
    for kind, bytes_of in {
        "int8": count + 4 * rows,
        "fp8": count + 4 * rows,
        "nf4": count / 2 + 4 * count / 64,
    }.items():
        saved = found["none"].parts["weights"] - found[kind].parts["weights"]
        assert saved == whole.dtype.itemsize * count - bytes_of
        assert found[kind].base_parameters == found["none"].base_parameters
        assert found[kind].flops_per_step == found["none"].flops_per_step


def test_blocks_that_wait_on_the_host_leave_the_two_largest_on_the_device() -> None:
    whole = memory_inputs(gradient_accumulation_steps=3)
    base = whole.config.base.model_copy(update={"offload": "blocks"})
    away = replace(whole, config=whole.config.model_copy(update={"base": base}))
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(SMALL.network)
    blocks = [m for path, m in unet.named_modules() if path.split(".")[-2:-1] in (["resnets"], ["transformer_blocks"])]
    sizes = sorted(4 * sum(parameter.numel() for parameter in block.parameters()) for block in blocks)
    plain, found = estimate_memory(whole), estimate_memory(away)
    assert plain.parts["weights"] - found.parts["weights"] == sum(sizes[:-2])
    assert (plain.transferred_bytes, found.transferred_bytes) == (0, 3 * 2 * sum(sizes))
    # A CPU is host and device at once.
    weights = [estimate_memory(replace(one, on_cpu=True)).parts["weights"] for one in (whole, away)]
    assert weights[1] - weights[0] == sum(sizes[-2:])


def test_prior_preservation_costs_the_exposures_compared() -> None:
    words = {"raw_trigger": "zumi", "class_words": ["cat"]}
    asked = memory_inputs(batch_size=4)

    def asked_with(every: int) -> RunConfig:
        data = asked.config.data.model_copy(update=words)
        train = asked.config.train.model_copy(update={"preservation_weight": 1.0, "preservation_every": every})
        return asked.config.model_copy(update={"data": data, "train": train})

    plain, whole = estimate_memory(asked), estimate_memory(replace(asked, config=asked_with(1)))
    for every in (1, 2, 4):
        found = estimate_memory(replace(asked, config=asked_with(every)))
        assert found.flops_per_step / plain.flops_per_step == pytest.approx(comparison_cost(1 / every), rel=0.03)
        assert (found.flops_per_step - plain.flops_per_step) * every == pytest.approx(
            whole.flops_per_step - plain.flops_per_step, rel=1e-3
        )
        assert plain.peak_bytes < found.peak_bytes <= whole.peak_bytes
