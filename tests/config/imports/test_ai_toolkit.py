"""ai-toolkit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.imports import FIXTURES, fate_of, flat, option

from sdlora.config.imports.detect import import_file
from sdlora.config.imports.rules import Imported

DOCUMENT = {
    "data.validation_split": False,
    "data.folder": "photos",
    "data.repeats": 12,
    "data.caption": "a girl",
    "data.trigger": "zumi",
    "data.resolution_px": 1024,
    "data.buckets": True,
    "data.bucket_step_px": 64,
    "data.caption_dropout": 0.05,
    "data.shuffle_tags": True,
    "data.keep_tags": 1,
    "data.masks": "alpha",
    "data.class_words": ["girl"],
    "name": "hero",
    "base.path": "models/illustrious.safetensors",
    "base.family": "sdxl",
    "base.quantization": "fp8",
    "train.compile": False,
    "train.epochs": 5,
    "train.batch_size": 2,
    "train.gradient_accumulation_steps": 2,
    "train.gradient_checkpointing": True,
    "train.learning_rate": 0.0002,
    "train.optimizer": "adamw8bit",
    "train.weight_decay": 0.0001,
    "train.text_encoder_learning_rate": 5e-05,
    "train.lr_schedule": "constant",
    "train.warmup_steps": 20,
    "train.max_grad_norm": 0.5,
    "train.precision": "bf16",
    "train.ema_decay": 0.99,
    "train.preservation_weight": 0.5,
    "lora.targets": ["cross_attention", "self_attention", "mlp", "projection", "conv", "text_encoder"],
    "lora.rank": 16,
    "lora.alpha": 8,
    "lora.target_ranks": {"conv": 8},
    "lora.target_alphas": {"conv": 4},
    "lora.dropout": 0.1,
    "loss.mask_floor": 0.1,
    "loss.weighting": "min_snr",
    "loss.gamma": 5,
    "loss.noise_offset": 0.05,
    "loss.kind": "mse",
    "timesteps.density": "cubic_high",
    "timesteps.min": 99,
    "timesteps.max": 999,
    "preview.prompts": [{"text": "zumi in a city", "seeds": [1]}, {"text": "zumi at the beach", "seeds": [2]}],
    "preview.every_steps": 250,
    "preview.negative_prompt": "blurry",
    "preview.guidance": 6,
    "preview.num_steps": 20,
    "preview.width_px": 832,
    "preview.height_px": 1216,
    "file.precision": "fp16",
}


def run(folder: Path, **parts: Any) -> Imported:
    """Translate a job whose parts are added to those of a small one."""
    basic: dict[str, Any] = {"type": "sd_trainer", "datasets": [{"folder_path": "photos"}], "train": {"steps": 100}}
    process = {
        key: {**basic[key], **value} if isinstance(value, dict) and key in basic else value
        for key, value in {**basic, **parts}.items()
    }
    job = {"job": "extension", "config": {"name": "hero", "process": [process]}}
    (folder / "job.yaml").write_text(yaml.safe_dump(job), encoding="utf-8")
    return import_file(folder / "job.yaml")


def test_every_documented_key_has_its_value() -> None:
    imported = import_file(FIXTURES / "ai_toolkit.yaml")
    assert flat(imported) == DOCUMENT
    assert not imported.open_keys


def test_own_defaults_count_where_they_differ(folder: Path) -> None:
    found = run(folder)
    assert not found.open_keys
    assert flat(found) == {
        "name": "hero", "data.folder": "photos", "data.repeats": 5, "data.validation_split": False,
        "lora.targets": ["cross_attention", "self_attention", "mlp", "projection"], "lora.rank": 4, "lora.alpha": 1,
        "train.epochs": 5, "train.learning_rate": 1e-6, "train.optimizer": "adamw", "train.weight_decay": 0.01,
        "train.precision": "fp32", "train.gradient_checkpointing": True, "data.resolution_px": 512, "data.keep_tags": 0,
        "file.precision": "fp16",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ({"network": {"rank": 16, "alpha": 8}}, {"lora.rank": 16, "lora.alpha": 8}),
        ({"network": {"linear": 16, "linear_alpha": 8, "alpha": 4}}, {"lora.rank": 16, "lora.alpha": 8}),
        ({"network": {"conv": 8}}, {"lora.target_ranks": {"conv": 8}, "lora.target_alphas": {"conv": 8}}),
        ({"network": {"type": "dora"}}, {"lora.dora": True}),
        ({"train": {"optimizer": "prodigy", "lr": "1e-4"}}, {"train.optimizer": "prodigy", "train.learning_rate": 1}),
        ({"train": {"lr": "3e-4"}}, {"train.learning_rate": 3e-4}),
        ({"train": {"batch_size": 2, "gradient_accumulation": 2}}, {"data.repeats": 20}),
        ({"train": {"gradient_accumulation_steps": 4}}, {"train.gradient_accumulation_steps": 4, "data.repeats": 5}),
        ({"train": {"train_text_encoder": True, "text_encoder_lr": 1e-5}}, {"train.text_encoder_learning_rate": 1e-5}),
        ({"train": {"lr_scheduler": "constant_with_warmup"}}, {"train.warmup_steps": 1000}),
        (
            {"network": {"network_kwargs": {"only_if_contains": ["attn2"], "ignore_if_contains": ["unet.mid_block."]}}},
            {"lora.targets": ["*attn2*", "!*mid_block.*"]},
        ),
        ({"train": {"lr_scheduler": "linear"}}, {"train.lr_schedule": "linear"}),
        ({"train": {"lr_scheduler": "cosine", "lr_scheduler_params": {}}}, {"train.lr_schedule": "cosine"}),
        (
            {"train": {"content_or_style": "style", "max_denoising_steps": 999}},
            {"timesteps.density": "cubic_low", "timesteps.min": 0},
        ),
        ({"train": {"ema_config": {"use_ema": True}}}, {"train.ema_decay": 0.999}),
        ({"train": {"disable_sampling": True}}, {"preview.enabled": False, "copycheck.enabled": False}),
        ({"model": {"quantize": True, "qtype": "qint8"}}, {"base.quantization": "int8"}),
        (
            {"model": {"name_or_path": "x/y", "is_v_pred": True}},
            {"base.prediction_type": "v_prediction", "base.path": "x/y"},
        ),
        (
            {"datasets": [{"dataset_path": "photos", "resolution": 768}]},
            {"data.folder": "photos", "data.resolution_px": 768},
        ),
        (
            {"datasets": [{"folder_path": "photos", "resolution": [768, 512]}]},
            {"data.resolution_px": None, "data.resolutions_px": [512, 768]},
        ),
        (
            {"model": {"lora_path": "a.safetensors"}, "network": {"pretrained_lora_path": "b.safetensors"}},
            {
                "base.merge": [{"file": "a.safetensors", "weight": 1.0}],
                "lora.from_file": "b.safetensors",
                "lora.rank": None,
                "lora.alpha": None,
                "lora.targets": None,
            },
        ),
        (
            {"model": {"arch": "sd15"}, "logging": {"use_wandb": True}},
            {"base.family": "sd1", "train.trackers": ["wandb"]},
        ),
        (
            {"sample": {"width": 512, "neg": "x", "samples": [{"prompt": "a", "width": 832}]}},
            {"preview.width_px": 832, "preview.negative_prompt": "x"},
        ),
        (
            {
                "sample": {
                    "width": 512,
                    "sample_every": 250,
                    "samples": [
                        {"prompt": "a", "width": 832, "network_multiplier": 0.5},
                        {"prompt": "b", "seed": 2},
                    ],
                }
            },
            {
                "preview.prompts": [
                    {"text": "a", "width_px": 832, "lora_scale": 0.5},
                    {"text": "b", "width_px": 512, "seeds": [2]},
                ],
                "preview.width_px": None,
                "preview.every_steps": 250,
            },
        ),
        ({"trigger_word": "zumi"}, {"data.trigger": "zumi"}),
        (
            {"model": {"name_or_path": "z.safetensors", "extras_name_or_path": "a/b", "vae_path": "c/d"}},
            {"base.path": "z.safetensors", "base.components": "a/b", "base.vae": "c/d"},
        ),
        ({"model": {"name_or_path": "x/y", "extras_name_or_path": "a/b"}}, {"base.components": None}),
        (
            {"sample": {"prompts": ["[trigger] a", "b"], "seed": 3}, "trigger_word": "zumi"},
            {"preview.prompts": ["zumi a", "b"], "preview.seeds": [3]},
        ),
    ],
)
def test_values(folder: Path, parts: dict[str, Any], expected: dict[str, Any]) -> None:
    found = run(folder, **parts)
    assert not found.open_keys
    assert {name: option(found, name) for name in expected} == expected


def test_regularisation_images_take_half_of_the_steps(folder: Path) -> None:
    found = run(
        folder,
        datasets=[{"folder_path": "photos"}, {"folder_path": "reg", "is_reg": True, "default_caption": "a girl"}],
    )
    assert not found.open_keys
    assert (option(found, "train.epochs"), option(found, "data.repeats")) == (4, 3)
    assert (option(found, "data.preservation_folder"), option(found, "train.preservation_weight")) == ("reg", 1)
    assert option(found, "data.preservation_caption") == "a girl"


@pytest.mark.parametrize(
    ("key", "parts"),
    [
        ("process.type", {"type": "slider"}),
        ("process.slider", {"slider": {"targets": []}}),
        ("process.model.arch", {"model": {"arch": "flux"}}),
        ("process.model.is_flux", {"model": {"is_flux": True}}),
        ("process.model.inference_lora_path", {"model": {"inference_lora_path": "x.safetensors"}}),
        ("process.model.quantize", {"model": {"quantize": True, "qtype": "uint3"}}),
        ("process.network.type", {"network": {"type": "lokr"}}),
        ("process.network.pretrained_lora_path", {"network": {"pretrained_lora_path": "x.pt"}}),
        (
            "process.datasets.resolution",
            {"datasets": [{"folder_path": "photos", "resolution": 512}, {"folder_path": "reg", "resolution": 768}]},
        ),
        (
            "process.datasets.keep_tokens",
            {"datasets": [{"folder_path": "photos"}, {"folder_path": "reg", "keep_tokens": 2}]},
        ),
        ("process.datasets.flip_x", {"datasets": [{"folder_path": "photos", "flip_x": True}]}),
        ("process.datasets.caption_ext", {"datasets": [{"folder_path": "photos", "caption_ext": "md"}]}),
        ("process.datasets.mask_path", {"datasets": [{"folder_path": "photos", "mask_path": "masks"}]}),
        ("process.datasets.folder_path", {"datasets": []}),
        ("process.train.steps", {"datasets": [{"folder_path": "nowhere"}]}),
        ("process.train.noise_scheduler", {"train": {"noise_scheduler": "flowmatch"}}),
        ("process.train.optimizer", {"train": {"optimizer": "automagic"}}),
        ("process.train.optimizer_params.betas", {"train": {"optimizer_params": {"betas": [0.9, 0.99]}}}),
        ("process.train.lr_scheduler", {"train": {"lr_scheduler": "step"}}),
        ("process.train.snr_gamma", {"train": {"snr_gamma": 5}}),
        ("process.train.loss_type", {"train": {"loss_type": "mae"}}),
        ("process.train.noise_multiplier", {"train": {"noise_multiplier": 1.1}}),
        ("process.train.blank_prompt_preservation", {"train": {"blank_prompt_preservation": True}}),
        ("process.train.diff_output_preservation", {"train": {"diff_output_preservation": True}}),
        ("process.nonsense", {"nonsense": 1}),
    ],
)
def test_what_would_be_another_result_is_refused(folder: Path, key: str, parts: dict[str, Any]) -> None:
    found = run(folder, **parts)
    assert key in found.open_keys or not parts.get("datasets", True)


def test_a_second_process_is_refused(folder: Path) -> None:
    job = {"job": "extension", "config": {"name": "x", "process": [{"type": "sd_trainer"}, {"type": "sd_trainer"}]}}
    (folder / "job.yaml").write_text(yaml.safe_dump(job), encoding="utf-8")
    assert "config.process" in import_file(folder / "job.yaml").open_keys


def test_the_job_may_be_json(folder: Path) -> None:
    file = folder / "job.json"
    file.write_text('{"job": "extension", "config": {"name": "hero", "process": []}}', encoding="utf-8")
    assert fate_of(import_file(file), "config.name").options == {"name": "hero"}
