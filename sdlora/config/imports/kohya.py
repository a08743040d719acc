"""sd-scripts (kohya): training arguments from a TOML or a command line, and the dataset configuration they may name.

One table over `rules` and `shared`; `kohya_gui` brings the GUI's JSON into the same keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdlora.common.files import read_toml
from sdlora.config.imports import kohya_values as take
from sdlora.config.imports.lora_files import CONTINUED
from sdlora.config.imports.previews import every_steps, sampler
from sdlora.config.imports.rules import (
    OFF,
    Rule,
    Source,
    compute,
    drop,
    dropped,
    flag,
    keys,
    number,
    pairs,
    part_of,
    refuse,
    refused,
    rename,
    switch,
    table,
    text,
    whole,
)
from sdlora.config.imports.shared import (
    MIN_SNR,
    TAG_DROPOUT,
    VAE,
    base_path,
    file_precision,
    optimizer_arguments,
    precision,
    schedule,
    trackers,
    unless_off,
)

DEFAULTS: dict[str, Any] = {
    "network_module": "networks.lora", "network_dim": 4, "network_alpha": 1, "learning_rate": 2e-6,
    "optimizer_type": "AdamW", "max_train_steps": 1600, "mixed_precision": "no", "enable_bucket": False,
    "keep_tokens": 0, "validation_split": 0.0,
}  # fmt: skip
"""sd-scripts' own defaults where sdlora's differ."""
DATA_DEFAULTS = {key: DEFAULTS[key] for key in ("enable_bucket", "keep_tokens", "validation_split")}
_OF_DATASETS = {"train_batch_size": "batch_size", "dataset_repeats": "num_repeats"}


def read(document: Mapping[str, Any], folder: Path) -> Source:
    """Training arguments, whose sections mean nothing, or a dataset configuration alone.

    Args:
        document: The TOML file's tables.
        folder: The file's folder, where a dataset configuration that it names may be.
    """
    if "datasets" in document:
        source = Source("sd-scripts' dataset configuration", {}, defaults=DATA_DEFAULTS)
        source.rows[""] = _subsets(document, {})
        return source
    values: dict[str, Any] = {}
    for key, value in document.items():
        values |= value if isinstance(value, dict) else {key: value}
    return of_arguments("sd-scripts", values, folder)


def of_arguments(form: str, values: dict[str, Any], folder: Path, implied: Mapping[str, Any] | None = None) -> Source:
    """The source of training arguments; lists of arguments get keys of their own, dataset configurations are read."""
    by_epochs = values.get("max_train_epochs") not in OFF
    defaults = {key: value for key, value in DEFAULTS.items() if not (by_epochs and key == "max_train_steps")}
    source = Source(form, values, defaults=defaults | dict(implied or {}))
    for key in ("network_args", "optimizer_args"):
        if key in values:
            try:
                values |= {f"{key}.{name}": value for name, value in pairs(values[key] or "").items()}
                del values[key]
            except ValueError as error:
                source.decided[key] = refused(f"cannot be read: {error}")
    if named := values.get("dataset_config"):
        _read_dataset_config(source, str(named), folder)
    return source


def _read_dataset_config(source: Source, named: str, folder: Path) -> None:
    """Read the dataset configuration that the arguments name; its values go before theirs."""
    path = next((path for path in (Path(named), folder / named) if path.is_file()), None)
    try:
        document = read_toml(path) if path else {}
    except (ValueError, OSError):
        document = {}
    if not isinstance(document.get("datasets"), list):
        source.decided["dataset_config"] = refused("no dataset configuration can be read there; set data.sets")
        return
    source.decided["dataset_config"] = dropped("read; its values go before those of the training arguments")
    names = {name for key in _SUBSET_KEYS for name in (key, _OF_DATASETS.get(key, key))}
    inherited = {_OF_DATASETS.get(key, key): value for key, value in source.values.items() if key in _SUBSET_KEYS}
    source.rows[""] = _subsets(document, inherited)
    for key in ("train_data_dir", "reg_data_dir", "in_json", *_OF_DATASETS):
        if key in source.values:
            source.decided[key] = dropped("the dataset configuration goes before it")
    source.values = {key: value for key, value in source.values.items() if key not in names or key in source.decided}


def _subsets(document: Mapping[str, Any], inherited: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every subset of a dataset configuration with what it inherits from its dataset and from [general]."""
    found: list[dict[str, Any]] = []
    general = _tables([document.get("general")])
    datasets = document.get("datasets")
    for dataset in _tables(datasets if isinstance(datasets, list) else []):
        subsets = dataset.pop("subsets", None)
        for subset in _tables(subsets if isinstance(subsets, list) else []):
            found.append({**inherited, **(general[0] if general else {}), **dataset, **subset})
    return _at_several_resolutions(found)


def _at_several_resolutions(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of one folder that differ in their resolution alone, as one with all of them, a tuple, and all repeats."""
    ignored = ("resolution", "min_bucket_reso", "max_bucket_reso")
    found: list[dict[str, Any]] = []
    for row in rows:
        rest = {key: value for key, value in row.items() if key not in ignored}
        alike = [other for other in rows if {key: value for key, value in other.items() if key not in ignored} == rest]
        edges = [take.edge_of(other.get("resolution")) for other in alike]
        repeats = row.get("num_repeats", 1)
        if len(alike) < 2 or None in edges or len(set(edges)) < len(edges) or not isinstance(repeats, int):
            found.append(row)
        elif row is alike[0]:
            found.append({**row, "resolution": tuple(edges), "num_repeats": len(edges) * repeats})
    return found


def _tables(values: list[Any]) -> list[dict[str, Any]]:
    return [dict(value) for value in values if isinstance(value, dict)]


_METADATA = "sdlora reads metadata.jsonl in the folder of the images; write it, and set data.folder"
_AUGMENT = "sdlora trains images as they are, cropped from the middle"
_CAPTIONS = "sdlora does not change captions in this way; write the captions so"
_CACHED = "sdlora always caches latents and, where they do not change, captions"
_ATTENTION = "attention needs no choice: PyTorch's own is used"
_SAVED = "sdlora saves every epoch, and a checkpoint to resume from"
_LOGGED = "sdlora writes metrics.jsonl, state.json and report.html of every run"
_HUB = "upload a finished LoRA with `sdlora push`"
_WORKERS = "sdlora reads cached images and needs no workers"
_LAUNCH = "how processes are started is the launcher's choice, and does not change the result"
_FAMILIES = "of model families other than Stable Diffusion 1.x, 2.x and XL, or of other scripts"

_SUBSET = table(
    {
        "batch_size": rename("train.batch_size", whole),
        "resolution": compute(take.resolution_of, "`data.resolution_px`, or `data.resolutions_px`"),
        "enable_bucket": rename("data.buckets", flag),
        "bucket_reso_steps": rename("data.bucket_step_px", whole),
        keys("min_bucket_reso max_bucket_reso"): drop("sdlora's buckets reach from 1:2 to 2:1 at the same area"),
        "bucket_no_upscale": switch({"data.no_upscale": True}),
        "image_dir": compute(take.data_of, "`data.folder` or `data.sets`", "all"),
        keys("num_repeats class_tokens"): part_of("image_dir"),
        "is_reg": compute(take.reg, "`data.preservation_folder`, `train.preservation_weight`", "all"),
        "metadata_file": refuse(_METADATA),
        "shuffle_caption": rename("data.shuffle_tags", flag),
        "keep_tokens": rename("data.keep_tags", whole),
        "caption_dropout_rate": rename("data.caption_dropout", number),
        "caption_dropout_every_n_epochs": refuse("sdlora drops captions by chance only; set data.caption_dropout"),
        "caption_tag_dropout_rate": TAG_DROPOUT,
        "caption_extension": compute(take.caption_extension, "dropped if .txt, .caption or .json, otherwise refused"),
        "caption_separator": compute(take.separator, "dropped if a comma, otherwise refused"),
        "keep_tokens_separator": rename("data.keep_separator", text),
        "enable_wildcard": switch({"data.wildcards": True, "data.caption_lines": True}),
        "caption_prefix": rename("data.caption_prefix", text),
        "caption_suffix": rename("data.caption_suffix", text),
        keys("secondary_separator token_warmup_step"): refuse(_CAPTIONS),
        "token_warmup_min": drop("only with token_warmup_step"),
        "flip_aug": switch({"data.flip": True}, "mirrored at every second exposure, not by chance"),
        keys("color_aug random_crop face_crop_aug_range"): refuse(_AUGMENT),
        "resize_interpolation": drop("sdlora resizes with one high-quality filter"),
        "alpha_mask": part_of("masked_loss"),
        "conditioning_data_dir": part_of("masked_loss"),
        "validation_split": compute(take.validation, "`data.validation_split`"),
        "validation_seed": drop("the run's seed chooses the validation images"),
        "cache_info": drop(_CACHED),
        "custom_attributes": drop("no script for Stable Diffusion reads it"),
        "network_multiplier": refuse("sdlora trains at strength 1", off=(*OFF, 1, 1.0, "1", "1.0")),
    }
)
_SUBSET_KEYS = {*_SUBSET, *_OF_DATASETS} - {
    "batch_size",
    "image_dir",
    "num_repeats",
    "class_tokens",
    "is_reg",
    "metadata_file",
}

_NETWORK = table(
    {
        "pretrained_model_name_or_path": compute(lambda value, source: base_path(value), "`base.path`"),
        "v_parameterization": switch({"base.prediction_type": "v_prediction"}),
        "v2": switch({"base.family": "sd2"}),
        "clip_skip": compute(take.clip_skip, "`base.clip_skip`"),
        "vae": VAE,
        "fp8_base": switch({"base.quantization": "fp8"}),
        "base_weights": compute(take.base_weights, "`base.merge`"),
        "base_weights_multiplier": part_of("base_weights"),
        "network_module": compute(take.module, "`lora.targets`; other kinds of adapters are refused"),
        keys("network_train_unet_only network_train_text_encoder_only"): part_of("network_module"),
        "network_dim": rename("lora.rank", whole),
        "network_alpha": compute(take.alpha, "`lora.alpha`; 0 is the rank"),
        "network_dropout": rename("lora.dropout", number),
        keys("conv_dim block_dims block_alphas conv_block_dims conv_block_alphas", "network_args"): compute(
            take.ranks_of, "`lora.target_ranks`, `lora.target_alphas`"
        ),
        "network_args.conv_alpha": part_of("network_args.conv_dim"),
        keys("down_lr_weight mid_lr_weight up_lr_weight", "network_args"): compute(
            take.rates_of, "`train.target_learning_rates`; blocks of rate 0 are left out of `lora.targets`"
        ),
        "network_args.block_lr_zero_threshold": drop("read with the weights by block"),
        keys("network_args.loraplus_lr_ratio network_args.loraplus_unet_lr_ratio"): rename(
            "train.loraplus_lr_ratio", number
        ),
        "network_args.loraplus_text_encoder_lr_ratio": compute(take.plus_encoder, "the same, or refused"),
        "network_args.rank_dropout": unless_off("lora.rank_dropout"),
        "network_args.module_dropout": unless_off("lora.module_dropout"),
        keys(
            "network_args.algo network_args.preset network_args.factor network_args.use_tucker "
            "network_args.use_scalar network_args.dora_wd network_args.decompose_both network_args.train_norm "
            "network_args.rank_dropout_scale network_args.constraint network_args.rescaled network_args.bypass_mode "
            "network_args.block_size network_args.unit network_args.train_on_input",
        ): part_of("network_module"),
        "scale_weight_norms": unless_off("train.max_weight_norm"),
        "network_weights": CONTINUED,
        "dim_from_weights": part_of("network_weights"),
    }
)
_TRAINING = table(
    {
        "train_data_dir": compute(take.data_of, "`data.folder` or `data.sets`, of its folders N_NAME"),
        "reg_data_dir": compute(take.reg, "`data.preservation_folder`, `train.preservation_weight`"),
        "prior_loss_weight": part_of("reg_data_dir"),
        "in_json": refuse(_METADATA),
        "dataset_repeats": part_of("in_json"),
        "dataset_class": refuse("sdlora reads folders of images; set data.folder"),
        "dataset_config": drop("read"),
        "max_train_epochs": compute(take.length_of, "`train.epochs`, with `data.repeats`"),
        "max_train_steps": compute(take.steps_of, "`train.epochs`, with `data.repeats`, if images can be counted"),
        "train_batch_size": rename("train.batch_size", whole),
        "gradient_accumulation_steps": rename("train.gradient_accumulation_steps", whole),
        "gradient_checkpointing": rename("train.gradient_checkpointing", flag),
        "learning_rate": compute(take.rate, "`train.learning_rate`"),
        "unet_lr": compute(take.unet_rate, "`train.learning_rate`"),
        "optimizer_type": compute(take.optimizer_of, "`train.optimizer`, `train.weight_decay`"),
        keys("use_8bit_adam use_lion_optimizer"): part_of("optimizer_type"),
        "optimizer_args.weight_decay": rename("train.weight_decay", number),
        "text_encoder_lr": compute(take.encoder_rate, "`train.text_encoder_learning_rate`"),
        "lr_scheduler": compute(
            lambda value, source: schedule(
                value,
                source.get("lr_scheduler_num_cycles", 1),
                power=source.get("lr_scheduler_power", 1),
                floor=source.get("lr_scheduler_min_lr_ratio", 0),
            ),
            "`train.lr_schedule` with `train.lr_cycles`, `train.lr_power`, `train.lr_floor`",
        ),
        keys("lr_scheduler_num_cycles lr_scheduler_power lr_scheduler_min_lr_ratio"): part_of("lr_scheduler"),
        keys("lr_scheduler_type lr_scheduler_args"): refuse("sdlora has schedules of its own; see train.lr_schedule"),
        "lr_warmup_steps": compute(take.warmup_of, "`train.warmup_steps`"),
        keys("lr_decay_steps lr_scheduler_timescale"): refuse("sdlora's schedules have no separate decay"),
        "max_grad_norm": rename("train.max_grad_norm", number),
        "mixed_precision": compute(lambda value, source: precision(value), "`train.precision`"),
        keys("full_fp16 full_bf16"): drop("sdlora keeps the adapter in float32, which is more accurate"),
        "seed": rename("seed", whole),
        "max_token_length": compute(take.tokens, "`data.max_token_windows`"),
        "weighted_captions": refuse("sdlora does not read weights such as (word:1.2) in captions"),
        "masked_loss": compute(take.masks, "`data.masks`, `loss.mask_floor`"),
        "noise_offset": rename("loss.noise_offset", number),
        "noise_offset_random_strength": switch({"loss.noise_offset_random": True}),
        "multires_noise_iterations": compute(take.multires, "`loss.multires_discount`"),
        "multires_noise_discount": part_of("multires_noise_iterations"),
        "ip_noise_gamma": unless_off("loss.input_perturbation"),
        keys("adaptive_noise_scale ip_noise_gamma_random_strength"): refuse(
            "sdlora has no such noise; see loss.noise_offset and loss.input_perturbation"
        ),
        "zero_terminal_snr": rename("loss.zero_terminal_snr", flag),
        "min_timestep": rename("timesteps.min", whole),
        "max_timestep": rename("timesteps.max", lambda value: whole(value) - 1),
        "loss_type": compute(take.loss_type, "`loss.kind`, `loss.huber_delta`"),
        keys("huber_schedule huber_c huber_scale"): part_of("loss_type"),
        "min_snr_gamma": MIN_SNR,
        "debiased_estimation_loss": switch({"loss.weighting": "debiased"}),
        keys("scale_v_pred_loss_like_noise_pred v_pred_like_loss"): refuse(
            "sdlora does not rescale losses in this way"
        ),
        "sample_prompts": compute(take.prompts, "`preview.prompts`, `preview.seeds`, and their other options"),
        "sample_every_n_steps": compute(every_steps, "`preview.every_steps`"),
        keys("sample_every_n_epochs sample_at_first"): drop(
            "sdlora draws previews from the base model and after every epoch"
        ),
        "sample_sampler": compute(sampler, "`preview.sampler`"),
        "output_name": rename("name", text),
        "output_dir": drop("a run's folder is runs/NAME, or what `sdlora train --output` says"),
        "save_precision": compute(lambda value, source: file_precision(value), "`file.precision`"),
        "metadata_license": rename("file.licence", lambda value: text(value).lower()),
        keys("save_model_as use_safetensors"): drop("sdlora writes .safetensors"),
        keys(
            "save_every_n_epochs save_every_n_steps save_n_epoch_ratio save_last_n_epochs save_last_n_epochs_state "
            "save_last_n_steps save_last_n_steps_state save_state save_state_on_train_end",
        ): drop(_SAVED),
        keys("resume skip_until_initial_step initial_epoch initial_step"): refuse(
            "a run of another trainer cannot be resumed; start a new one"
        ),
        keys(
            "no_metadata training_comment metadata_title metadata_author metadata_description metadata_tags",
        ): drop("sdlora writes its own metadata and model card"),
        keys(
            "huggingface_repo_id huggingface_repo_type huggingface_path_in_repo huggingface_token "
            "huggingface_repo_visibility save_state_to_huggingface resume_from_huggingface async_upload",
        ): drop(_HUB),
        keys(
            "logging_dir log_prefix log_tracker_name log_tracker_config log_config wandb_api_key wandb_run_name",
        ): drop(_LOGGED),
        "log_with": compute(lambda value, source: trackers(value), "`train.trackers`"),
        keys("validate_every_n_steps validate_every_n_epochs max_validation_steps"): drop(
            "the validation loss is measured after every epoch"
        ),
        keys(
            "cache_latents cache_latents_to_disk skip_cache_check vae_batch_size cache_text_encoder_outputs "
            "cache_text_encoder_outputs_to_disk text_encoder_batch_size",
        ): drop(_CACHED),
        keys("xformers sdpa mem_eff_attn"): drop(_ATTENTION),
        keys("max_data_loader_n_workers persistent_data_loader_workers"): drop(_WORKERS),
        keys(
            "lowram highvram no_half_vae disable_mmap_load_safetensors tokenizer_cache_dir cpu_offload_checkpointing "
            "fused_backward_pass ddp_timeout ddp_gradient_as_bucket_view ddp_static_graph console_log_level "
            "console_log_file console_log_simple debug_dataset config_file output_config",
        ): drop("does not change the result"),
        "torch_compile": rename("train.compile", flag),
        "dynamo_backend": drop("only with torch_compile"),
        keys(
            "deepspeed zero_stage offload_optimizer_device offload_optimizer_nvme_path offload_param_device "
            "offload_param_nvme_path zero3_init_flag zero3_save_16bit_model fp16_master_weights_and_gradients",
        ): drop(_LAUNCH),
        "train_inpainting": refuse("sdlora does not train inpainting models"),
        "stop_text_encoder_training": refuse(
            "sdlora counts epochs; set train.text_encoder_epochs", off=(*OFF, -1, "-1")
        ),
        keys("weighting_scheme logit_mean logit_std mode_scale blocks_to_swap fp8_base_unet"): drop(_FAMILIES),
    }
)
_ARGUMENTS = {f"optimizer_args.{name}": take.argument_of(name) for name in optimizer_arguments()}
RULES: dict[str, Rule] = _NETWORK | _TRAINING | _ARGUMENTS | _SUBSET
