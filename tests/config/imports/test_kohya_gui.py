"""kohya_ss, the GUI over sd-scripts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.imports import FIXTURES, fate_of, flat, of_json, option

from sdlora.config.imports.detect import import_file
from sdlora.config.imports.rules import Status

DOCUMENT = {
    "base.path": "models/illustrious.safetensors",
    "base.family": "sdxl",
    "lora.targets": ["cross_attention", "self_attention", "mlp", "projection", "conv", "text_encoder"],
    "lora.rank": 32,
    "lora.alpha": 16,
    "lora.dropout": 0.1,
    "lora.target_ranks": {"conv": 16},
    "lora.target_alphas": {"conv": 8},
    "data.folder": "photos/10_hero",
    "data.repeats": 20,
    "data.caption": "hero",
    "data.max_token_windows": 3,
    "data.resolution_px": 1024,
    "data.buckets": True,
    "data.bucket_step_px": 64,
    "data.shuffle_tags": True,
    "data.keep_tags": 1,
    "data.caption_dropout": 0.05,
    "data.validation_split": False,
    "train.epochs": 5,
    "train.batch_size": 4,
    "train.gradient_accumulation_steps": 1,
    "train.gradient_checkpointing": True,
    "train.learning_rate": 0.0003,
    "train.optimizer": "adamw8bit",
    "train.weight_decay": 0.1,
    "train.text_encoder_learning_rate": 5e-05,
    "train.lr_schedule": "cosine",
    "train.warmup_steps": 50,
    "train.max_grad_norm": 1,
    "train.precision": "bf16",
    "seed": 1234,
    "loss.noise_offset": 0.05,
    "loss.zero_terminal_snr": False,
    "loss.kind": "mse",
    "loss.weighting": "min_snr",
    "loss.gamma": 8,
    "timesteps.max": 999,
    "preview.prompts": [
        {"text": "1girl, hero, city", "width_px": 832, "height_px": 1216, "seeds": [1]},
        {"text": "1girl, hero, beach", "seeds": [2]},
    ],
    "preview.negative_prompt": "blurry",
    "preview.num_steps": 25,
    "preview.guidance": 6,
    "preview.sampler": "euler_a",
    "name": "hero",
    "file.precision": "fp16",
}
BASIC = {
    "LoRA_type": "Standard",
    "train_data_dir": "photos",
    "epoch": 10,
    "learning_rate": 1e-4,
    "max_resolution": "512,512",
}


def test_every_documented_key_has_its_value() -> None:
    imported = import_file(FIXTURES / "kohya_ss.json")
    assert flat(imported) == DOCUMENT
    assert not imported.open_keys
    keys = {fate.key for fate in imported.fates}
    assert set(json.loads((FIXTURES / "kohya_ss.json").read_text(encoding="utf-8"))) - {"optimizer_args"} <= keys


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {"train.epochs": 5, "data.repeats": 20}),
        ({"max_train_epochs": "2"}, {"train.epochs": 2, "data.repeats": 10}),
        ({"max_train_steps": 50, "train_batch_size": 2}, {"train.epochs": 5, "data.repeats": 5}),
        ({"lr_warmup": 10, "lr_warmup_steps": 0}, {"train.warmup_steps": 40}),
        ({"lr_warmup": 10, "lr_warmup_steps": 7}, {"train.warmup_steps": 7}),
        (
            {"text_encoder_lr": 0, "unet_lr": 3e-4},
            {"lora.targets": ["cross_attention", "self_attention", "mlp", "projection"]},
        ),
        ({"text_encoder_lr": 3e-4, "unet_lr": 0}, {"lora.targets": ["text_encoder"]}),
        ({"text_encoder_lr": 0, "unet_lr": 0}, {"train.learning_rate": 1e-4, "train.text_encoder_learning_rate": None}),
        ({"noise_offset_type": "Multires", "noise_offset": 0.1}, {"loss.noise_offset": None}),
        ({"conv_dim": 8}, {"lora.target_ranks": None}),
        ({"sdxl": True, "clip_skip": "2"}, {"base.clip_skip": None, "base.family": "sdxl"}),
        ({"log_with": "all"}, {"train.trackers": ["tensorboard", "wandb"]}),
        ({"sdxl": False, "clip_skip": "2"}, {"base.clip_skip": 2}),
        ({"seed": 0}, {"seed": None}),
        ({"additional_parameters": "--max_grad_norm=0 --network_train_unet_only"}, {"train.max_grad_norm": 0}),
        ({"optimizer_args": "weight_decay=0.3"}, {"train.weight_decay": 0.3}),
        ({"lr_scheduler": "cosine", "lr_scheduler_num_cycles": ""}, {"train.lr_schedule": "cosine"}),
    ],
)
def test_values(folder: Path, settings: dict[str, Any], expected: dict[str, Any]) -> None:
    found = of_json(folder, BASIC | settings)
    assert not found.open_keys
    assert {name: option(found, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("key", "settings"),
    [
        ("LoRA_type", {"LoRA_type": "LyCORIS/LoHa"}),
        ("LoRA_type", {"LoRA_type": "Flux1", "flux1_checkbox": True}),
        ("flux1_checkbox", {"LoRA_type": "Flux1", "flux1_checkbox": True}),
        ("down_lr_weight", {"down_lr_weight": "1,1"}),
        ("network_weights", {"network_weights": "old.ckpt"}),
        ("num_processes", {"num_processes": 2}),
        (
            "additional_parameters: lr_scheduler_type",
            {"additional_parameters": '--lr_scheduler_type "CosineAnnealingLR"'},
        ),
        ("additional_parameters", {"additional_parameters": '--lr "'}),
        ("text_encoder_lr", {"text_encoder_lr": "fast"}),
        ("lr_warmup", {"lr_warmup": "much"}),
        ("nonsense", {"nonsense": 1}),
    ],
)
def test_what_would_be_another_result_is_refused(folder: Path, key: str, settings: dict[str, Any]) -> None:
    assert key in of_json(folder, BASIC | settings).open_keys


def test_keys_are_named_as_in_the_gui(folder: Path) -> None:
    found = of_json(folder, BASIC)
    assert {"LoRA_type", "epoch", "max_resolution"} <= {fate.key for fate in found.fates}
    assert fate_of(found, "epoch").status is Status.TRANSLATED
