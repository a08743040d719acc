"""Settings as the arguments of the rooms below."""

from __future__ import annotations

from pathlib import Path

import torch
from helpers.adapters import UNET_TARGETS

from sdlora.config.schema import LoraConfig, RunConfig
from sdlora.config.toml import parse_config
from sdlora.lora.targets import target_of
from sdlora.lora.timestep_rank import TimestepRank
from sdlora.models.load import load_base
from sdlora.run.arguments import make_adapter, timestep_rank, training_settings


def test_timestep_rank_is_none_unless_a_minimum_is_set() -> None:
    assert timestep_rank(RunConfig()) is None
    lora = LoraConfig(timestep_rank_min=2, timestep_rank_alpha=2.0)
    assert timestep_rank(RunConfig(lora=lora)) == TimestepRank(2, 2.0)


def test_text_encoder_rate_becomes_a_factor_of_the_learning_rate() -> None:
    assert training_settings(RunConfig()).text_encoder_factor == 1.0
    document = {
        "data": {"folder": "x"},
        "lora": {"targets": ["text_encoder"]},
        "train": {"learning_rate": 4e-4, "text_encoder_learning_rate": 1e-4},
    }
    assert training_settings(parse_config(document, name="x")).text_encoder_factor == 0.25


def test_every_setting_reaches_the_layers(tiny_base: Path) -> None:
    base = load_base(str(tiny_base), device=torch.device("cpu"), dtype=torch.float32)
    lora = LoraConfig(
        rank=4, alpha=2.0, targets=[*UNET_TARGETS, "text_encoder"], target_ranks={"mlp": 3}, target_alphas={"conv": 6},
        rslora=True, dropout=0.25, init="pissa", timestep_rank_min=2,
    )  # fmt: skip
    adapter = make_adapter(RunConfig(lora=lora), base)
    for path, layer in adapter.layers.items():
        assert layer.rank == (3 if target_of(path) == "mlp" else 4)
        assert abs(layer.scale - (6 if target_of(path) == "conv" else 2) / layer.rank**0.5) < 1e-6
        assert layer.dropout == 0.25
        assert layer.initial is not None
    base.predict(torch.zeros(2, 4, 8, 8), torch.tensor([0, 999]), {"states": torch.zeros(2, 77, 16)})
    masks = [layer.rank_mask for path, layer in adapter.layers.items() if target_of(path) != "text_encoder"]
    assert {tuple(mask.sum(1).tolist()) for mask in masks if mask is not None} == {(4.0, 2.0), (3.0, 2.0)}
