"""sd-scripts: training arguments and dataset configurations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.imports import FIXTURES, fate_of, flat, of_arguments, option

from sdlora.config.imports.detect import import_file
from sdlora.config.imports.kohya_values import sample_prompts
from sdlora.config.imports.rules import Status

BLOCKS = ["cross_attention", "self_attention", "mlp", "projection"]
ARGUMENTS = {
    "base.path": "models/illustrious.safetensors",
    "base.prediction_type": "v_prediction",
    "base.clip_skip": 2,
    "lora.targets": ["cross_attention", "self_attention", "mlp", "projection", "conv", "text_encoder"],
    "lora.rank": 16,
    "lora.alpha": 8,
    "lora.dropout": 0.1,
    "lora.target_ranks": {"conv": 8},
    "lora.target_alphas": {"conv": 4},
    "train.loraplus_lr_ratio": 4,
    "train.preservation_weight": 0.5,
    "train.epochs": 5,
    "train.batch_size": 4,
    "train.gradient_accumulation_steps": 2,
    "train.gradient_checkpointing": True,
    "train.learning_rate": 0.0003,
    "train.optimizer": "adamw8bit",
    "train.weight_decay": 0.1,
    "train.text_encoder_learning_rate": 5e-05,
    "train.lr_schedule": "cosine",
    "train.warmup_steps": 100,
    "train.max_grad_norm": 0.5,
    "train.precision": "bf16",
    "train.trackers": ["tensorboard"],
    "train.compile": False,
    "data.folder": "photos/10_hero",
    "data.repeats": 20,
    "data.caption": "hero",
    "data.preservation_folder": "reg/1_girl",
    "data.preservation_caption": "girl",
    "data.max_token_windows": 3,
    "data.masks": "alpha",
    "data.resolution_px": 1024,
    "data.buckets": True,
    "data.bucket_step_px": 64,
    "data.shuffle_tags": True,
    "data.keep_tags": 2,
    "data.caption_dropout": 0.05,
    "data.validation_split": True,
    "seed": 42,
    "loss.mask_floor": 0.0,
    "loss.noise_offset": 0.05,
    "loss.zero_terminal_snr": False,
    "loss.kind": "huber",
    "loss.huber_delta": 0.2,
    "loss.huber_schedule": "constant",
    "loss.weighting": "min_snr",
    "loss.gamma": 5,
    "timesteps.min": 50,
    "timesteps.max": 949,
    "preview.sampler": "euler_a",
    "name": "hero",
    "file.precision": "fp16",
    "file.licence": "cc-by-4.0",
}
DATASETS = {
    "train.batch_size": 2,
    "train.preservation_weight": 1,
    "data.resolution_px": 768,
    "data.buckets": True,
    "data.bucket_step_px": 32,
    "data.sets": [
        {"folder": "photos", "repeats": 10, "caption": "zumi girl"},
        {"folder": "C:\\sets\\second", "repeats": 5},
    ],
    "data.preservation_folder": "reg",
    "data.preservation_caption": "girl",
    "data.shuffle_tags": True,
    "data.keep_tags": 1,
    "data.caption_dropout": 0.05,
    "data.validation_split": False,
}


@pytest.mark.parametrize(("name", "expected"), [("sd_scripts.toml", ARGUMENTS), ("sd_scripts_dataset.toml", DATASETS)])
def test_every_documented_key_has_its_value(name: str, expected: dict[str, Any]) -> None:
    imported = import_file(FIXTURES / name)
    assert flat(imported) == expected
    assert not imported.open_keys


def test_own_defaults_count_where_they_differ() -> None:
    found = flat(of_arguments(train_data_dir="photos", max_train_epochs=1))
    assert found == {
        "data.folder": "photos/10_hero", "data.repeats": 10, "data.caption": "hero", "data.buckets": False,
        "data.keep_tags": 0, "data.validation_split": False, "lora.rank": 4, "lora.alpha": 1,
        "lora.targets": ["cross_attention", "self_attention", "mlp", "projection", "text_encoder"],
        "train.epochs": 1, "train.learning_rate": 2e-6, "train.optimizer": "adamw", "train.weight_decay": 0.01,
        "train.precision": "fp32",
    }  # fmt: skip


def test_ten_epochs_of_ten_repeats_are_five_of_twenty() -> None:
    found = of_arguments(train_data_dir="photos", max_train_epochs=10)
    assert (option(found, "train.epochs"), option(found, "data.repeats")) == (5, 20)
    assert "stay the same (100)" in fate_of(found, "max_train_epochs").reason


@pytest.mark.parametrize(("reg", "repeats"), [("", 20), ("reg", 10)])
def test_steps_become_exposures(reg: str, repeats: int) -> None:
    found = of_arguments(
        train_data_dir="photos",
        reg_data_dir=reg,
        max_train_steps=100,
        train_batch_size=2,
        gradient_accumulation_steps=2,
    )
    assert (option(found, "train.epochs"), option(found, "data.repeats")) == (5, repeats)


def test_the_default_of_1600_steps_counts_too() -> None:
    found = of_arguments(train_data_dir="photos")
    assert option(found, "train.epochs") * option(found, "data.repeats") == 400
    missing = of_arguments(train_data_dir="nowhere")
    assert fate_of(missing, "max_train_steps").status is Status.REFUSED


def test_a_folder_that_is_elsewhere_gives_its_repeats_where_training_starts() -> None:
    found = of_arguments(train_data_dir="D:/sets/hero", max_train_epochs=4)
    assert not found.open_keys
    assert (option(found, "data.folder"), option(found, "train.epochs")) == ("D:/sets/hero", 4)
    assert option(found, "data.repeats") is None
    longer = of_arguments(train_data_dir="D:/sets/hero", max_train_epochs=10)
    assert longer.open_keys == ["max_train_epochs"]
    assert "train.exposures to 10 times" in fate_of(longer, "max_train_epochs").reason
    assert of_arguments(train_data_dir="reg/1_girl", max_train_epochs=2).open_keys == ["train_data_dir"]


def test_several_folders_become_sets_with_their_repeats(folder: Path) -> None:
    (folder / "photos" / "2_red hat").mkdir()
    found = of_arguments(train_data_dir="photos", max_train_epochs=10)
    assert option(found, "data.sets") == [
        {"folder": "photos/10_hero", "repeats": 20, "caption": "hero"},
        {"folder": "photos/2_red hat", "repeats": 4, "caption": "red hat"},
    ]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"network_alpha": 0, "network_dim": 8}, {"lora.alpha": 8}),
        ({"network_alpha": "2.5"}, {"lora.alpha": 2.5}),
        (
            {"network_train_unet_only": True},
            {"lora.targets": ["cross_attention", "self_attention", "mlp", "projection"]},
        ),
        ({"network_train_text_encoder_only": True}, {"lora.targets": ["text_encoder"]}),
        ({"text_encoder_lr": 0}, {"lora.targets": ["cross_attention", "self_attention", "mlp", "projection"]}),
        ({"network_args": ["conv_dim=4"]}, {"lora.target_ranks": {"conv": 4}, "lora.target_alphas": {"conv": 1}}),
        ({"network_args": ["conv_dim=4", "conv_alpha=0"]}, {"lora.target_alphas": {"conv": 4}}),
        (
            {"lr_scheduler": "cosine_with_restarts", "lr_scheduler_num_cycles": 3},
            {"train.lr_schedule": "cosine_restarts", "train.lr_cycles": 3},
        ),
        (
            {"text_encoder_lr": "1e-4, 1e-5"},
            {"train.text_encoder_learning_rate": 1e-4, "train.target_learning_rates": {"text_encoder_2": 1e-5}},
        ),
        (
            {"text_encoder_lr": [1e-4, 0], "network_train_unet_only": False},
            {"lora.targets": [*BLOCKS, "text_encoder_1"], "train.text_encoder_learning_rate": 1e-4},
        ),
        (
            {
                "network_dim": 8,
                "network_args": ["conv_dim=4", f"block_dims=0,{','.join('22444888888')},16,{'8,' * 10}0,0"],
            },
            {
                "lora.target_ranks": {"1-2": 2, "3-5": 4, "12": 16, "conv": 4},
                "lora.targets": [*BLOCKS, "conv", "text_encoder", "!23-24"],
            },
        ),
        (
            {"unet_lr": 1e-4, "network_args": ["down_lr_weight=0,0,0,0,1,1,1,1,0.5", "mid_lr_weight=2,2,2"]},
            {
                "train.target_learning_rates": {"8": 5e-5, "9": 2e-4},
                "lora.targets": [*BLOCKS, "text_encoder", "!1-3"],
            },
        ),
        (
            {"loss_type": "huber", "huber_c": 0.2},
            {"loss.kind": "huber", "loss.huber_delta": 0.2, "loss.huber_schedule": "snr"},
        ),
        (
            {"multires_noise_iterations": 6, "ip_noise_gamma": 0.1, "scale_weight_norms": 1},
            {"loss.multires_discount": 0.3, "loss.input_perturbation": 0.1, "train.max_weight_norm": 1},
        ),
        (
            {"network_args": ["rank_dropout=0.1", "module_dropout=0.2"]},
            {"lora.rank_dropout": 0.1, "lora.module_dropout": 0.2},
        ),
        ({"network_args": "loraplus_lr_ratio=16"}, {"train.loraplus_lr_ratio": 16}),
        ({"learning_rate": 1e-3}, {"train.learning_rate": 1e-3}),
        ({"learning_rate": 1e-3, "unet_lr": "1e-4"}, {"train.learning_rate": 1e-4}),
        ({"text_encoder_lr": [1e-5]}, {"train.text_encoder_learning_rate": 1e-5}),
        ({"use_8bit_adam": True}, {"train.optimizer": "adamw8bit"}),
        ({"use_lion_optimizer": True}, {"train.optimizer": "lion", "train.weight_decay": 0}),
        ({"optimizer_type": "Adafactor", "optimizer_args": ["relative_step=False"]}, {"train.optimizer": "adafactor"}),
        ({"optimizer_type": "Prodigy", "learning_rate": 1}, {"train.optimizer": "prodigy", "train.weight_decay": 0}),
        ({"optimizer_args": ["weight_decay=0.2"]}, {"train.weight_decay": 0.2}),
        ({"lr_warmup_steps": 0.1, "max_train_epochs": 1}, {"train.warmup_steps": 4}),
        ({"max_token_length": 150}, {"data.max_token_windows": 2}),
        ({"clip_skip": 0}, {"base.clip_skip": None}),
        ({"fp8_base": True}, {"base.quantization": "fp8"}),
        ({"masked_loss": True, "alpha_mask": True}, {"data.masks": "alpha", "loss.mask_floor": 0}),
        ({"debiased_estimation_loss": True}, {"loss.weighting": "debiased"}),
        ({"min_snr_gamma": 0}, {"loss.weighting": None}),
        ({"v_parameterization": True, "zero_terminal_snr": True}, {"loss.zero_terminal_snr": True}),
        ({"save_precision": "float"}, {"file.precision": "fp32"}),
        ({"seed": 7}, {"seed": 7}),
    ],
)
def test_values(arguments: dict[str, Any], expected: dict[str, Any]) -> None:
    found = of_arguments(**{"train_data_dir": "photos", "max_train_epochs": 1, **arguments})
    assert not found.open_keys
    assert {name: option(found, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("key", "arguments"),
    [
        ("network_module", {"network_module": "lycoris.kohya", "network_args": ["algo=loha"]}),
        ("network_module", {"network_module": "networks.lora_flux"}),
        ("network_args.block_dims", {"network_args": ["block_dims=2,2"]}),
        ("network_args.down_lr_weight", {"network_args": ["down_lr_weight=1"]}),
        ("network_args.loraplus_text_encoder_lr_ratio", {"network_args": ["loraplus_text_encoder_lr_ratio=4"]}),
        ("network_args", {"network_args": ["conv_dim"]}),
        ("network_args.down_lr_weight", {"network_args": ["down_lr_weight=sine"]}),
        ("network_args.conv_block_dims", {"network_args": ["conv_dim=4", f"conv_block_dims=4,2,{'4,' * 22}4"]}),
        ("text_encoder_lr", {"text_encoder_lr": [1e-4, 1e-5, 1e-6]}),
        ("optimizer_type", {"optimizer_type": "DAdaptAdam"}),
        ("optimizer_type", {"optimizer_type": "Adafactor"}),
        ("optimizer_args.betas", {"optimizer_args": ["betas=0.9,0.99"]}),
        ("optimizer_type", {"optimizer_type": "Prodigy"}),
        ("lr_scheduler", {"lr_scheduler": "piecewise_constant"}),
        ("max_token_length", {"max_token_length": 100}),
        ("caption_extension", {"caption_extension": ".cap"}),
        ("caption_separator", {"caption_separator": ";"}),
        ("masked_loss", {"masked_loss": True, "conditioning_data_dir": "masks"}),
        ("loss_type", {"loss_type": "l1"}),
        ("resolution", {"resolution": "512,768"}),
        ("pretrained_model_name_or_path", {"pretrained_model_name_or_path": "x.ckpt"}),
        ("reg_data_dir", {"reg_data_dir": "nowhere"}),
        ("dataset_config", {"dataset_config": "nowhere.toml"}),
        ("zero_terminal_snr", {"min_snr_gamma": 5, "zero_terminal_snr": True, "v_parameterization": True}),
        ("network_dim", {"network_dim": 1000}),
        ("train_data_dir", {"train_data_dir": "reg/1_girl"}),
    ],
)
def test_what_would_be_another_result_is_refused(key: str, arguments: dict[str, Any]) -> None:
    found = of_arguments(**{"train_data_dir": "photos", "max_train_epochs": 1, **arguments})
    if key == "zero_terminal_snr":
        assert found.open_keys == ["min_snr_gamma"], "the pair is refused once"
    else:
        assert key in found.open_keys


def test_small_images_are_not_enlarged() -> None:
    found = of_arguments(train_data_dir="photos", max_train_epochs=1, bucket_no_upscale=True)
    assert not found.open_keys and option(found, "data.no_upscale") is True


def test_a_dataset_configuration_goes_before_the_arguments(folder: Path) -> None:
    (folder / "sets.toml").write_text(
        (FIXTURES / "sd_scripts_dataset.toml").read_text(encoding="utf-8"), encoding="utf-8"
    )
    (folder / "run.toml").write_text(
        'dataset_config = "sets.toml"\nmax_train_epochs = 10\ntrain_data_dir = "unused"\nnetwork_dim = 8\n'
        "train_batch_size = 7\nresolution = '512'\nkeep_tokens = 3\ncaption_dropout_rate = 0.5\n",
        encoding="utf-8",
    )
    found = import_file(folder / "run.toml")
    assert not found.open_keys
    assert [entry["repeats"] for entry in option(found, "data.sets")] == [20, 10]
    assert (option(found, "train.batch_size"), option(found, "data.resolution_px")) == (2, 768)
    assert (option(found, "data.keep_tags"), option(found, "data.caption_dropout")) == (1, 0.05)
    assert option(found, "lora.rank") == 8
    assert fate_of(found, "train_data_dir").status is Status.DROPPED


def test_arguments_reach_subsets_that_do_not_set_them(folder: Path) -> None:
    (folder / "sets.toml").write_text("[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'photos'\n", encoding="utf-8")
    found = of_arguments(
        dataset_config="sets.toml", max_train_epochs=2, keep_tokens=3, dataset_repeats=4, train_batch_size=6
    )
    assert not found.open_keys
    assert (option(found, "data.keep_tags"), option(found, "data.repeats")) == (3, 4)
    assert option(found, "train.batch_size") == 6


def test_sets_that_differ_in_what_sdlora_has_once_are_refused(folder: Path) -> None:
    (folder / "sets.toml").write_text(
        "[[datasets]]\nresolution = 512\n[[datasets.subsets]]\nimage_dir = 'photos'\n"
        "[[datasets]]\nresolution = 768\n[[datasets.subsets]]\nimage_dir = 'reg'\nkeep_tokens = 2\n",
        encoding="utf-8",
    )
    found = import_file(folder / "sets.toml")
    assert found.open_keys == ["resolution", "keep_tokens"]
    assert all("each entry of data.sets" in fate_of(found, key).reason for key in found.open_keys)


def test_one_folder_in_several_datasets_is_trained_at_all_their_resolutions(folder: Path) -> None:
    def dataset(px: int, more: str = "") -> str:
        subsets = "".join(
            f"[[datasets.subsets]]\nimage_dir = '{name}'\nnum_repeats = 2\n{more}" for name in ("photos", "reg")
        )
        return f"[[datasets]]\nresolution = [{px}, {px}]\nmax_bucket_reso = {2 * px}\n{subsets}"

    (folder / "sets.toml").write_text(dataset(512) + dataset(1024), encoding="utf-8")
    found = import_file(folder / "sets.toml")
    assert not found.open_keys
    assert option(found, "data.resolutions_px") == [512, 1024]
    assert option(found, "data.sets") == [{"folder": "photos", "repeats": 4}, {"folder": "reg", "repeats": 4}]
    (folder / "sets.toml").write_text(dataset(512) + dataset(1024, "keep_tokens = 3\n"), encoding="utf-8")
    assert "resolution" in import_file(folder / "sets.toml").open_keys


def test_a_lora_is_continued_as_it_is_on_a_base_with_others_merged() -> None:
    found = of_arguments(
        train_data_dir="photos", max_train_epochs=1, network_weights="old.safetensors", dim_from_weights=True,
        network_dim=64, network_alpha=1, network_args=["conv_dim=8", "conv_alpha=4"], network_dropout=0.1,
        base_weights=["a.safetensors", "b.safetensors", "c.safetensors"], base_weights_multiplier=[0.5, 0],
    )  # fmt: skip
    assert not found.open_keys
    assert found.document["lora"] == {"from_file": "old.safetensors", "dropout": 0.1}
    assert option(found, "base.merge") == [
        {"file": "a.safetensors", "weight": 0.5}, {"file": "c.safetensors", "weight": 1.0},
    ]  # fmt: skip
    assert {fate_of(found, key).status for key in ("network_dim", "network_alpha", "network_args.conv_dim")} == {
        Status.DROPPED
    }
    (one,) = option(of_arguments(train_data_dir="photos", base_weights="a.safetensors"), "base.merge")
    assert one == {"file": "a.safetensors", "weight": 1.0}
    assert "network_weights" in of_arguments(train_data_dir="photos", network_weights="x.pt").open_keys


def test_prompts_of_previews_are_taken_from_lines() -> None:
    found = sample_prompts(
        [
            "# a comment",
            "a cat, best --n low quality, bad --w 832 --h 1216 --d 3 --l 5.5 --s 20",
            "a dog --d 4 --ss ddim",
            "",
        ]
    )
    assert found.options == {
        "preview.prompts": [
            {
                "text": "a cat, best", "negative_prompt": "low quality, bad", "num_steps": 20, "guidance": 5.5,
                "width_px": 832, "height_px": 1216, "seeds": [3],
            },
            {"text": "a dog", "seeds": [4]},
        ],
    }  # fmt: skip
    assert "--ss ddim" in found.reason
    shared = sample_prompts(["a --l 4 --n x --ss k_euler_a --cn some.png", "b --l 5 --n x --ss euler_a --am 0.5"])
    assert shared.options == {
        "preview.prompts": [{"text": "a", "guidance": 4}, {"text": "b", "guidance": 5, "lora_scale": 0.5}],
        "preview.negative_prompt": "x", "preview.sampler": "euler_a",
    }  # fmt: skip
    assert shared.reason.startswith("--cn dropped")
    with pytest.raises(ValueError, match="--w 'wide'"):
        sample_prompts(["a --w wide"])


def test_prompts_of_previews_are_read_from_a_file(folder: Path) -> None:
    (folder / "prompts.txt").write_text("a cat --d 1\n", encoding="utf-8")
    found = of_arguments(train_data_dir="photos", max_train_epochs=1, sample_prompts="prompts.txt")
    assert option(found, "preview.prompts") == ["a cat"]
    missing = of_arguments(train_data_dir="photos", max_train_epochs=1, sample_prompts="gone.txt")
    assert fate_of(missing, "sample_prompts").status is Status.DROPPED
