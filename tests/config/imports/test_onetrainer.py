"""OneTrainer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.imports import FIXTURES, fate_of, flat, of_json, option

from sdlora.config.imports.detect import import_file
from sdlora.config.imports.rules import Status

DOCUMENT = {
    "base.family": "sdxl",
    "base.path": "models/illustrious.safetensors",
    "base.prediction_type": "v_prediction",
    "base.clip_skip": 3,
    "lora.targets": ["cross_attention", "self_attention", "mlp", "projection", "text_encoder"],
    "lora.rank": 32,
    "lora.alpha": 16,
    "lora.dora": True,
    "lora.dropout": 0.1,
    "data.folder": "photos",
    "data.repeats": 8,
    "data.validation_folder": "validation",
    "data.shuffle_tags": True,
    "data.keep_tags": 2,
    "data.resolution_px": 1024,
    "data.buckets": True,
    "data.caption_dropout": 0.05,
    "data.masks": "file",
    "data.validation_split": True,
    "loss.mask_floor": 0.2,
    "loss.kind": "huber",
    "loss.huber_delta": 0.2,
    "loss.weighting": "p2",
    "loss.gamma": 2,
    "loss.noise_offset": 0.05,
    "loss.zero_terminal_snr": False,
    "train.epochs": 5,
    "train.batch_size": 4,
    "train.gradient_accumulation_steps": 2,
    "train.learning_rate": 0.0002,
    "train.optimizer": "adamw",
    "train.weight_decay": 0.05,
    "train.text_encoder_learning_rate": 0.0001,
    "train.lr_schedule": "cosine",
    "train.warmup_steps": 100,
    "train.max_grad_norm": 0.5,
    "train.ema_decay": 0.99,
    "train.precision": "bf16",
    "train.gradient_checkpointing": True,
    "train.compile": False,
    "train.trackers": ["tensorboard"],
    "timesteps.min": 100,
    "timesteps.max": 899,
    "timesteps.density": "logit_normal",
    "timesteps.mean": 0.25,
    "timesteps.std": 1.5,
    "preview.prompts": [{"text": "hero in a city", "seeds": [5]}, {"text": "hero at the beach", "seeds": [6]}],
    "preview.negative_prompt": "blurry",
    "preview.num_steps": 25,
    "preview.guidance": 5.5,
    "preview.width_px": 832,
    "preview.height_px": 1216,
    "preview.sampler": "euler_a",
    "file.precision": "fp16",
    "file.format": "peft",
    "name": "hero",
}
BASIC = {
    "training_method": "LORA",
    "base_model_name": "x.safetensors",
    "concepts": [{"path": "photos", "balancing": 10}],
    "epochs": 10,
    "text_encoder": {"stop_training_after_unit": "NEVER"},
}


def test_every_documented_key_has_its_value() -> None:
    imported = import_file(FIXTURES / "onetrainer.json")
    assert flat(imported) == DOCUMENT
    assert not imported.open_keys


def test_several_resolutions_flips_and_a_lora_to_continue(folder: Path) -> None:
    flipped = {"concepts": [{"path": "photos", "image": {"enable_random_flip": True}}]}
    assert option(of_json(folder, BASIC | flipped), "data.flip") is True
    found = of_json(folder, BASIC | {"resolution": "768, 512", "lora_model_name": "x.safetensors", "lora_rank": 32})
    assert not found.open_keys
    assert option(found, "data.resolutions_px") == [512, 768] and option(found, "data.resolution_px") is None
    assert found.document["lora"] == {"from_file": "x.safetensors"}
    assert fate_of(found, "lora_rank").reason == "the file of lora.from_file has it"


def test_own_defaults_count_where_they_differ(folder: Path) -> None:
    found = of_json(folder, BASIC)
    assert not found.open_keys
    assert flat(found) == {
        "base.family": "sd1", "base.path": "x.safetensors", "data.folder": "photos", "data.repeats": 20,
        "data.resolution_px": 512,
        "data.validation_split": False, "lora.rank": 16, "lora.alpha": 1,
        "lora.targets": ["cross_attention", "self_attention", "mlp", "projection", "conv", "text_encoder"],
        "train.epochs": 5, "train.learning_rate": 3e-6, "train.warmup_steps": 200, "train.optimizer": "adamw",
        "train.weight_decay": 0.01, "train.precision": "fp16", "train.gradient_checkpointing": True,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"model_type": "STABLE_DIFFUSION_21"}, {"base.prediction_type": "v_prediction", "base.family": "sd2"}),
        ({"concepts": [{"path": "photos", "include_subdirectories": True}]}, {"data.recursive": True}),
        (
            {"samples": [{"prompt": "a", "noise_scheduler": "DPMPP_KARRAS", "width": 700}]},
            {"preview.sampler": "dpmpp_2m_karras", "preview.width_px": 696},
        ),
        ({"samples": [{"prompt": "a", "noise_scheduler": "DDIM"}]}, {"preview.sampler": None}),
        ({"tensorboard": True}, {"train.trackers": ["tensorboard"]}),
        (
            {"layer_filter_preset": "attn-mlp"},
            {"lora.targets": ["cross_attention", "self_attention", "mlp", "projection", "text_encoder"]},
        ),
        (
            {"layer_filter_preset": "attn-only", "text_encoder": {"train": False}},
            {"lora.targets": ["cross_attention", "self_attention"]},
        ),
        (
            {"layer_filter_preset": "custom", "layer_filter": "attn2, ff", "text_encoder": {"train": False}},
            {"lora.targets": ["cross_attention", "mlp"]},
        ),
        ({"unet": {"weight_dtype": "NFLOAT_4"}}, {"base.quantization": "nf4"}),
        ({"unet": {"weight_dtype": "FLOAT_8"}}, {"base.quantization": "fp8"}),
        ({"unet": {"learning_rate": 1e-4}}, {"train.learning_rate": 1e-4}),
        ({"model_type": "STABLE_DIFFUSION_15", "text_encoder_layer_skip": 1}, {"base.clip_skip": 2}),
        ({"loss_weight_fn": "MIN_SNR_GAMMA"}, {"loss.weighting": "min_snr", "loss.gamma": 5}),
        ({"min_snr_gamma": 3}, {"loss.weighting": "min_snr", "loss.gamma": 3}),
        ({"loss_weight_fn": "DEBIASED_ESTIMATION"}, {"loss.weighting": "debiased"}),
        ({"timestep_distribution": "LOGIT_NORMAL"}, {"timesteps.mean": 0, "timesteps.std": 1}),
        ({"ema": "CPU"}, {"train.ema_decay": 0.9998}),
        ({"ema": "OFF"}, {"train.ema_decay": None}),
        (
            {"optimizer": {"optimizer": "SCHEDULE_FREE_ADAMW"}},
            {"train.optimizer": "schedule_free", "train.weight_decay": 0.01},
        ),
        ({"optimizer": {"optimizer": "LION", "beta2": 0.99}}, {"train.optimizer": "lion"}),
        ({"learning_rate_scheduler": "COSINE", "learning_rate_min_factor": 0.1}, {"train.lr_floor": 0.1}),
        ({"learning_rate_scheduler": "REX"}, {"train.lr_schedule": "rex"}),
        ({"learning_rate_scheduler": "COSINE_WITH_HARD_RESTARTS"}, {"train.lr_schedule": "cosine"}),
        ({"learning_rate_warmup_steps": 0.25}, {"train.warmup_steps": 100}),
        ({"masked_training": True}, {"data.masks": "file", "loss.mask_floor": None}),
        ({"output_model_format": "KOHYA_LORA"}, {"file.format": "kohya"}),
        (
            {"gradient_checkpointing": "OFF", "unet": {"gradient_checkpointing": False}},
            {"train.gradient_checkpointing": False},
        ),
    ],
)
def test_values(folder: Path, settings: dict[str, Any], expected: dict[str, Any]) -> None:
    encoder = {**BASIC["text_encoder"], **settings.get("text_encoder", {})}  # type: ignore[dict-item]
    found = of_json(folder, BASIC | settings | {"text_encoder": encoder})
    assert not found.open_keys
    if settings.get("masked_training"):
        expected = {**expected, "loss.mask_floor": 0.1}
    assert {name: option(found, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("key", "settings"),
    [
        ("training_method", {"training_method": "FINE_TUNE"}),
        ("model_type", {"model_type": "FLUX_DEV_1"}),
        ("model_type", {"model_type": "STABLE_DIFFUSION_XL_10_BASE_INPAINTING"}),
        ("peft_type", {"peft_type": "LOHA"}),
        ("lora_decompose", {"lora_decompose": True}),
        ("layer_filter_preset", {"layer_filter_preset": "custom", "layer_filter": "down_blocks.1"}),
        ("text_encoder.train", {"model_type": "STABLE_DIFFUSION_XL_10_BASE", "text_encoder_2": {"train": False}}),
        ("text_encoder.stop_training_after", {"text_encoder": {}, "epochs": 100}),
        ("epochs", {"concepts": []}),
        ("concepts.path", {"concepts": [{"path": "photos", "balancing": 100, "balancing_strategy": "SAMPLES"}]}),
        ("concepts.type", {"concepts": [{"path": "photos"}, {"path": "reg", "type": "PRIOR_PREDICTION"}]}),
        (
            "concepts.image.enable_random_rotate",
            {"concepts": [{"path": "photos", "image": {"enable_random_rotate": True}}]},
        ),
        ("concepts.text.prompt_source", {"concepts": [{"path": "photos", "text": {"prompt_source": "filename"}}]}),
        ("concepts.loss_weight", {"concepts": [{"path": "photos", "loss_weight": 0.5}]}),
        ("optimizer.optimizer", {"optimizer": {"optimizer": "CAME"}}),
        ("optimizer.beta2", {"optimizer": {"optimizer": "ADAMW", "beta2": 0.99}}),
        ("learning_rate_scheduler", {"learning_rate_scheduler": "COSINE_WITH_RESTARTS"}),
        ("learning_rate_scaler", {"learning_rate_scaler": "BATCH"}),
        ("mse_strength", {"mse_strength": 0.5, "mae_strength": 0.5}),
        ("loss_weight_fn", {"loss_weight_fn": "SIGMA"}),
        ("timestep_distribution", {"timestep_distribution": "BETA"}),
        ("timestep_shift", {"timestep_shift": 3.0}),
        ("additional_embeddings", {"additional_embeddings": [{"placeholder": "<x>"}]}),
        ("resolution", {"resolution": "512x768"}),
        ("resolution", {"resolution": "512x512,768x768"}),
        ("lora_model_name", {"lora_model_name": "x.ckpt"}),
        ("output_model_format", {"output_model_format": "COMFY_LORA"}),
        ("nonsense", {"nonsense": 1}),
    ],
)
def test_what_would_be_another_result_is_refused(folder: Path, key: str, settings: dict[str, Any]) -> None:
    assert key in of_json(folder, BASIC | settings).open_keys


def test_concepts_and_samples_are_read_from_their_files(folder: Path) -> None:
    (folder / "concepts.json").write_text(json.dumps([{"path": "photos"}, {"path": "reg", "balancing": 2}]))
    (folder / "samples.json").write_text(json.dumps([{"prompt": "a cat", "seed": 3, "cfg_scale": 6}]))
    settings = {key: value for key, value in BASIC.items() if key != "concepts"}
    found = of_json(
        folder, settings | {"concept_file_name": "concepts.json", "sample_definition_file_name": "samples.json"}
    )
    assert not found.open_keys
    assert option(found, "data.sets") == [{"folder": "photos", "repeats": 2}, {"folder": "reg", "repeats": 4}]
    assert (option(found, "preview.prompts"), option(found, "preview.guidance")) == (["a cat"], 6)


def test_a_preset_without_concepts_asks_for_the_folder(folder: Path) -> None:
    found = of_json(folder, {key: value for key, value in BASIC.items() if key != "concepts"})
    assert {"epochs", "images"} <= set(found.open_keys)
    assert option(found, "data.folder") == "images"


def test_differing_samples_keep_their_own_settings(folder: Path) -> None:
    found = of_json(folder, BASIC | {"samples": [{"prompt": "a", "cfg_scale": 5}, {"prompt": "b", "cfg_scale": 7}]})
    assert option(found, "preview.prompts") == [{"text": "a", "guidance": 5}, {"text": "b", "guidance": 7}]
    assert fate_of(found, "samples.cfg_scale").status is Status.TRANSLATED


def test_samples_after_steps_are_drawn_within_epochs(folder: Path) -> None:
    assert (
        option(of_json(folder, BASIC | {"sample_after": 50, "sample_after_unit": "STEP"}), "preview.every_steps") == 50
    )
    assert fate_of(of_json(folder, BASIC | {"sample_after": 10}), "sample_after").status is Status.DROPPED
