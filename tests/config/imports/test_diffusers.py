"""diffusers' training scripts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.imports import FIXTURES, flat, option

from sdlora.config.imports.detect import import_file
from sdlora.config.imports.rules import Imported

IMAGES = {
    "lora.targets": ["cross_attention", "self_attention", "text_encoder"],
    "lora.rank": 16,
    "lora.alpha": 16,
    "base.family": "sdxl",
    "base.path": "models/illustrious.safetensors",
    "base.revision": "main",
    "base.variant": "fp16",
    "base.prediction_type": "epsilon",
    "data.buckets": False,
    "data.validation_split": False,
    "data.folder": "photos",
    "data.repeats": 2,
    "data.resolution_px": 1024,
    "train.epochs": 5,
    "train.batch_size": 2,
    "train.gradient_accumulation_steps": 4,
    "train.gradient_checkpointing": True,
    "train.learning_rate": 0.0008,
    "train.optimizer": "adamw8bit",
    "train.weight_decay": 0.001,
    "train.lr_schedule": "cosine",
    "train.warmup_steps": 0,
    "train.max_grad_norm": 0.5,
    "train.precision": "bf16",
    "train.trackers": ["wandb"],
    "seed": 1337,
    "loss.weighting": "min_snr",
    "loss.gamma": 5,
    "loss.noise_offset": 0.05,
    "preview.prompts": ["a zumi in a bucket"],
    "preview.seeds": [0, 1],
    "name": "hero",
}
DREAMBOOTH = {
    "lora.targets": ["cross_attention", "self_attention", "text_encoder"],
    "lora.rank": 16,
    "lora.alpha": 16,
    "lora.dropout": 0.1,
    "lora.dora": True,
    "base.family": "sdxl",
    "base.path": "models/illustrious.safetensors",
    "base.revision": "main",
    "base.variant": "fp16",
    "data.buckets": False,
    "data.validation_split": False,
    "data.folder": "photos",
    "data.repeats": 20,
    "data.caption": "a zumi",
    "data.preservation_folder": "reg",
    "data.preservation_caption": "a toy",
    "data.resolution_px": 1024,
    "train.preservation_weight": 0.5,
    "train.epochs": 5,
    "train.batch_size": 2,
    "train.gradient_accumulation_steps": 4,
    "train.gradient_checkpointing": True,
    "train.learning_rate": 1,
    "train.optimizer": "prodigy",
    "train.weight_decay": 0.001,
    "train.text_encoder_learning_rate": 1,
    "train.lr_schedule": "cosine",
    "train.warmup_steps": 0,
    "train.max_grad_norm": 0.5,
    "train.precision": "bf16",
    "train.trackers": ["wandb"],
    "seed": 1337,
    "preview.prompts": ["a zumi in a bucket"],
    "preview.seeds": [0, 1],
    "name": "hero",
    "file.format": "kohya",
}
DREAMBOOTH_SD = {
    "lora.targets": ["cross_attention", "self_attention"],
    "lora.rank": 16,
    "lora.alpha": 16,
    "lora.dropout": 0.1,
    "data.buckets": False,
    "data.validation_split": False,
    "data.folder": "photos",
    "data.repeats": 4,
    "data.caption": "a zumi",
    "data.resolution_px": 512,
    "base.path": "models/illustrious.safetensors",
    "base.revision": "main",
    "base.variant": "fp16",
    "train.epochs": 5,
    "train.batch_size": 2,
    "train.gradient_accumulation_steps": 4,
    "train.gradient_checkpointing": True,
    "train.learning_rate": 0.0001,
    "train.optimizer": "adamw",
    "train.weight_decay": 0.001,
    "train.lr_schedule": "constant",
    "train.max_grad_norm": 0.5,
    "train.precision": "bf16",
    "train.trackers": ["wandb"],
    "seed": 1337,
    "preview.prompts": ["a zumi in a bucket"],
    "preview.seeds": [0, 1],
    "name": "hero",
}


def run(folder: Path, arguments: str, script: str = "train_text_to_image_lora.py", launcher: str = "") -> Imported:
    (folder / "run.sh").write_text(f"accelerate launch {launcher} {script} --seed 1 {arguments}\n", encoding="utf-8")
    return import_file(folder / "run.sh")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("diffusers_images.txt", IMAGES),
        ("diffusers_dreambooth.txt", DREAMBOOTH),
        ("diffusers_dreambooth_sd.txt", DREAMBOOTH_SD),
    ],
)
def test_every_documented_key_has_its_value(name: str, expected: dict[str, Any]) -> None:
    imported = import_file(FIXTURES / name)
    assert flat(imported) == expected
    assert not imported.open_keys


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("train_text_to_image_lora.py", (16, 5, 20, 1e-4, 0.01, 512)),
        ("train_text_to_image_lora_sdxl.py", (16, 5, 20, 1e-4, 0.01, 1024)),
        ("train_dreambooth_lora.py", (4, 1, 1, 5e-4, 0.01, 512)),
        ("train_dreambooth_lora_sdxl.py", (4, 1, 1, 1e-4, 1e-4, 1024)),
    ],
)
def test_own_defaults_count_where_they_differ(folder: Path, script: str, expected: tuple[Any, ...]) -> None:
    name = "instance_data_dir" if "dreambooth" in script else "train_data_dir"
    found = run(folder, f"--{name} photos", script)
    assert not found.open_keys
    names = (
        "train.batch_size", "train.epochs", "data.repeats", "train.learning_rate", "train.weight_decay",
        "data.resolution_px",
    )  # fmt: skip
    assert tuple(option(found, one) for one in names) == expected
    assert (option(found, "lora.rank"), option(found, "lora.alpha"), option(found, "data.buckets")) == (4, 4, False)
    assert option(found, "lora.targets") == ["cross_attention", "self_attention"]
    assert option(found, "train.warmup_steps") is None, "a constant rate has no warmup there"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("--max_train_steps 100 --train_batch_size=4", {"train.epochs": 5, "data.repeats": 20}),
        ("--num_train_epochs 3", {"train.epochs": 3, "data.repeats": 1}),
        ("--lr_scheduler polynomial --lr_power 2", {"train.lr_schedule": "polynomial", "train.lr_power": 2}),
        ("--lr_scheduler cosine --lr_warmup_steps 5", {"train.warmup_steps": 5}),
        ("--use_8bit_adam", {"train.optimizer": "adamw8bit"}),
        ("--mixed_precision fp16", {"train.precision": "fp16"}),
        ("--snr_gamma 5", {"loss.weighting": "min_snr", "loss.gamma": 5}),
        ("--output_dir out/hero/", {"name": "hero"}),
        ("--validation_prompt 'a cat'", {"preview.prompts": ["a cat"]}),
    ],
)
def test_values(folder: Path, arguments: str, expected: dict[str, Any]) -> None:
    found = run(folder, f"--train_data_dir photos {arguments}")
    assert not found.open_keys
    assert {name: option(found, name) for name in expected} == expected


def test_an_epoch_lasts_as_long_as_its_class_images(folder: Path) -> None:
    found = run(
        folder,
        "--instance_data_dir reg --with_prior_preservation --class_data_dir photos --class_prompt cat "
        "--num_train_epochs 5",
        "train_dreambooth_lora.py",
    )
    assert not found.open_keys
    assert (option(found, "train.epochs"), option(found, "data.repeats")) == (5, 2)


@pytest.mark.parametrize(
    ("key", "arguments"),
    [
        ("dataset_name", "--dataset_name lambdalabs/naruto"),
        ("caption_column", "--train_data_dir photos --caption_column caption"),
        ("lr_scheduler", "--train_data_dir photos --lr_scheduler piecewise_constant"),
        ("max_train_steps", "--train_data_dir nowhere --max_train_steps 100"),
        ("with_prior_preservation", "--train_data_dir photos --with_prior_preservation"),
        ("pretrained_vae_model_name_or_path", "--train_data_dir photos --pretrained_vae_model_name_or_path x.pt"),
        ("adam_beta2", "--train_data_dir photos --adam_beta2 0.99"),
        ("resume_from_checkpoint", "--train_data_dir photos --resume_from_checkpoint latest"),
        ("nonsense", "--train_data_dir photos --nonsense"),
        ("images", "--rank 4"),
    ],
)
def test_what_would_be_another_result_is_refused(folder: Path, key: str, arguments: str) -> None:
    assert key in run(folder, arguments).open_keys


def test_random_flips_become_mirrored_exposures(folder: Path) -> None:
    found = run(folder, "--train_data_dir photos --random_flip")
    assert not found.open_keys
    assert option(found, "data.flip") is True


def test_the_launcher_counts_where_the_script_says_nothing(folder: Path) -> None:
    found = run(folder, "--train_data_dir photos", launcher="--mixed_precision=bf16 --num_processes 2")
    assert option(found, "train.precision") == "bf16"
    assert found.open_keys == ["launch.num_processes"]
    both = run(folder, "--train_data_dir photos --mixed_precision fp16", launcher="--mixed_precision=bf16")
    assert option(both, "train.precision") == "fp16"
    assert not both.open_keys
