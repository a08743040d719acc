"""Plans against the counts that are known, and against what real networks hold."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from sdlora.config.schema import RunConfig
from sdlora.config.toml import parse_config
from sdlora.estimate import memory
from sdlora.estimate.memory import Need, Setting, need
from sdlora.estimate.meta_model import MetaBase, Shapes, num_bytes, shapes_of_family
from sdlora.lora.inject import AdapterSpec, inject
from sdlora.lora.layers import LoraLinear
from sdlora.lora.targets import find_targets
from sdlora.training.optimizers import Group, OptimizerSettings, make_optimizer

CROSS = ["cross_attention"]
BOTH = ["cross_attention", "self_attention"]
ALL = ["cross_attention", "self_attention", "mlp"]


def config(**train: Any) -> RunConfig:
    document = {"data": {"folder": "x", "resolution_px": 64}, "train": train, "preview": {"enabled": False}}
    return parse_config(document, name="x")


def config_of_text() -> RunConfig:
    document = {"data": {"folder": "x"}, "lora": {"targets": ["text_encoder"]}, "preview": {"enabled": False}}
    return parse_config(document, name="x")


SMALL = Shapes(
    unet={
        "sample_size": 16, "block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "cross_attention_dim": 32, "attention_head_dim": 4,
    },
    vae={
        "block_out_channels": (8, 8), "down_block_types": ("DownEncoderBlock2D",) * 2, "norm_num_groups": 4,
        "up_block_types": ("UpDecoderBlock2D",) * 2, "latent_channels": 4, "layers_per_block": 1,
    },
    text_encoders=({"hidden_size": 32, "max_position_embeddings": 77, "num_hidden_layers": 1},),
    vae_bytes=400,
    text_bytes=600,
)  # fmt: skip


def setting(dtype: torch.dtype = torch.float32, **train: Any) -> Setting:
    return Setting(config(**train), AdapterSpec(), SMALL, dtype, (64, 64))


@pytest.mark.parametrize(
    ("family", "counts"), [("sd1", (795_648, 1_594_368, 2_992_128)), ("sdxl", (6_287_360, 11_612_160, 20_930_560))]
)
def test_trained_parameters_are_those_of_the_families(family: Any, counts: tuple[int, ...]) -> None:
    base = MetaBase(shapes_of_family(family), torch.bfloat16)
    for targets, count in zip((CROSS, BOTH, ALL), counts, strict=True):
        adapter = inject(base.unet, find_targets(base.unet, targets), 8, 8.0, 0)
        assert adapter.num_parameters() == count
        adapter.remove()


def test_a_layer_of_4096_at_rank_8_has_65536_numbers() -> None:
    layer = LoraLinear(nn.Linear(4096, 4096, device="meta"), 8, 8.0)
    assert memory.adapter_parameters(4096, 4096, 8) == layer.down.numel() + layer.up.numel() == 65_536
    assert layer.base.weight.numel() == 16_777_216


def test_full_fine_tuning_takes_16_bytes_for_every_parameter() -> None:
    assert memory.full_training_bytes(8_000_000_000) == 128_000_000_000


def test_a_step_of_stable_diffusion_costs_what_the_formula_says() -> None:
    """F + (F_conv + F_linear + 2 F_attention - what lies below the first adapter) + 6 n r (i + o)."""
    shapes = shapes_of_family("sd1")
    asked = parse_config({"data": {"folder": "x"}, "lora": {"targets": BOTH}, "preview": {"enabled": False}}, name="x")
    found = need(Setting(asked, AdapterSpec(), shapes, torch.bfloat16, (512, 512)))
    assert found.trainable_parameters == 1_594_368
    assert found.base_parameters == 859_520_964
    assert found.flops == pytest.approx(1718e9, rel=0.005)


@pytest.mark.parametrize("optimizer", ["adamw", "prodigy", "lion", "schedule_free", "adafactor"])
def test_an_optimizers_state_is_as_large_as_planned(optimizer: str) -> None:
    parameter = nn.Parameter(torch.randn(64, 64))
    made = make_optimizer(OptimizerSettings(optimizer, 0.5), [Group([parameter], 1.0)])
    parameter.grad = torch.randn(64, 64)
    made.step()
    values = [v for state in made.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    held = sum(value.nbytes for value in values) / parameter.numel()
    assert held == pytest.approx(memory.OPTIMIZER_BYTES[optimizer], abs=1.0)


def test_parts_are_the_networks_own_bytes() -> None:
    found = need(replace(setting(), on_cpu=True))
    unet = UNet2DConditionModel.from_config(dict(SMALL.unet))
    assert found.parts["weights"] == num_bytes(unet) + 1000
    assert found.parts["adapter"] == 16 * found.trainable_parameters
    assert found.peak_bytes == sum(found.parts.values())
    half = replace(setting(torch.bfloat16), on_cpu=True)
    assert need(half).parts["weights"] == num_bytes(unet) // 2 + 1000
    assert need(setting(ema_decay=0.9)).parts["adapter"] == 20 * found.trainable_parameters


def test_networks_that_take_turns_count_where_they_are() -> None:
    unet = num_bytes(UNet2DConditionModel.from_config(dict(SMALL.unet)))
    turns = setting()
    assert need(turns).parts["weights"] == unet
    assert need(turns).parts["previews"] == 0
    assert need(replace(turns, text_is_live=True)).parts["weights"] == unet + 600
    assert need(replace(turns, config=config_of_text())).parts["weights"] == unet + 600
    together = need(replace(turns, on_cpu=True))
    assert together.peak_bytes - together.parts["previews"] - need(turns).peak_bytes == 1000
    # As large as nothing else in the run: then the larger one alone decides, whether text is kept or not.
    for vae, text in ((10**9, 3 * 10**9), (3 * 10**9, 10**9)):
        large = replace(turns, shapes=replace(SMALL, vae_bytes=vae, text_bytes=text))
        for live in (False, True):
            found = need(replace(large, text_is_live=live))
            held = found.peak_bytes - unet - found.parts["adapter"] - found.parts["overhead"]
            assert held == pytest.approx(3e9, rel=0.01)
        found = need(replace(large, config=config_of_text()))
        assert found.peak_bytes - unet == pytest.approx(4e9, rel=0.01)


def test_activations_grow_with_the_batch_and_shrink_with_checkpointing() -> None:
    one, two = (need(setting(batch_size=size)) for size in (1, 2))
    assert two.parts["activations"] == pytest.approx(2 * one.parts["activations"], rel=0.1)
    assert two.flops == pytest.approx(2 * one.flops, rel=0.01)
    less = need(setting(batch_size=2, gradient_checkpointing=True))
    assert less.parts["activations"] < 0.7 * two.parts["activations"]
    assert 1.2 < less.flops / two.flops < 1.6


def test_packed_weights_take_a_byte_or_little_more_than_half() -> None:
    wide = {**SMALL.unet, "block_out_channels": (64, 128), "cross_attention_dim": 64}
    whole = replace(setting(), shapes=replace(SMALL, unet=wide))

    def packed(kind: str) -> Need:
        base = whole.config.base.model_copy(update={"quantization": kind})
        return need(replace(whole, config=whole.config.model_copy(update={"base": base})))

    found = {kind: packed(kind) for kind in ("none", "int8", "nf4")}
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(wide)
    linear = [m for path, m in unet.named_modules() if "attentions." in path and isinstance(m, torch.nn.Linear)]
    count = sum(m.weight.numel() for m in linear)
    rows = sum(m.out_features for m in linear)
    assert all(m.in_features % 64 == 0 for m in linear)
    for kind, bytes_of in {"int8": count + 4 * rows, "nf4": count / 2 + 4 * count / 64}.items():
        saved = found["none"].parts["weights"] - found[kind].parts["weights"]
        assert saved == whole.dtype.itemsize * count - bytes_of
        assert found[kind].base_parameters == found["none"].base_parameters
        assert found[kind].flops == found["none"].flops


def test_what_is_offered_is_taken_together() -> None:
    asked = setting(compile=True, batch_size=2)
    everything = memory.changes(asked, need(asked), 1)
    told = [part for change in everything for part in change.change.split(" and ")]
    assert "train.compile = false" in told
    document = {"data": {"folder": "x"}, "train": {"compile": True}}
    found = parse_config(document, name="x", overrides=[part.replace(" = ", "=") for part in told])
    assert (found.base.quantization, found.train.compile) != ("none", True)


def test_what_is_prior_costs_the_exposures_that_are_kept() -> None:
    words = {"raw_trigger": "zumi", "class_words": ["cat"]}
    asked = setting(batch_size=4)

    def asked_with(every: int) -> RunConfig:
        data = asked.config.data.model_copy(update=words)
        train = asked.config.train.model_copy(update={"preservation_weight": 1.0, "preservation_every": every})
        return asked.config.model_copy(update={"data": data, "train": train})

    plain, whole = need(asked), need(replace(asked, config=asked_with(1)))
    for every in (1, 2, 4):
        found = need(replace(asked, config=asked_with(every)))
        assert found.flops / plain.flops == pytest.approx(memory.preservation_time(1 / every), rel=0.03)
        assert (found.flops - plain.flops) * every == pytest.approx(whole.flops - plain.flops, rel=1e-3)
        assert plain.peak_bytes < found.peak_bytes <= whole.peak_bytes


def test_changes_are_offered_until_it_fits_and_no_further() -> None:
    asked = setting(batch_size=4)
    needed = need(asked)
    assert memory.changes(asked, needed, needed.peak_bytes) == []
    (first,) = memory.changes(asked, needed, needed.peak_bytes - 1)
    assert first.change == "train.precision = 'bf16'"
    assert first.time == 1.0
    everything = memory.changes(asked, needed, 1)
    assert [change.change.split(" ")[0] for change in everything][:4] == [
        "train.precision", "train.batch_size", "base.quantization", "train.gradient_checkpointing",
    ]  # fmt: skip
    peaks = [needed.peak_bytes, *(change.peak_bytes for change in everything)]
    assert peaks == sorted(peaks, reverse=True)
    assert everything[2].time == pytest.approx(everything[1].time, rel=0.01)
    assert everything[3].time > 1.2
