"""OneTrainer: a preset or a saved configuration in JSON, and the lists of concepts and samples that it may name.

One table over `rules` and `shared`. Nested settings have dotted keys, such as "unet.learning_rate".
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdlora.common.files import read_text
from sdlora.config.imports import onetrainer_values as take
from sdlora.config.imports.lora_files import CONTINUED
from sdlora.config.imports.rules import (
    OFF,
    Rule,
    Source,
    compute,
    drop,
    dropped,
    flag,
    flatten,
    keys,
    number,
    part_of,
    refuse,
    rename,
    switch,
    table,
    text,
    whole,
)  # fmt: skip
from sdlora.config.imports.shared import (
    MIN_SNR,
    VAE,
    base_path,
    file_precision,
    precision,
)

FORM = "OneTrainer"
DEFAULTS: dict[str, Any] = {
    "training_method": "FINE_TUNE", "model_type": "STABLE_DIFFUSION_15", "epochs": 100, "learning_rate": 3e-6,
    "learning_rate_warmup_steps": 200, "lora_rank": 16, "lora_alpha": 1.0, "layer_filter_preset": "full",
    "resolution": "512", "train_dtype": "FLOAT_16", "optimizer.optimizer": "ADAMW", "validation": False,
    "unet.gradient_checkpointing": True, "text_encoder.train": True, "text_encoder_2.train": True,
    "text_encoder.stop_training_after": 30, "text_encoder.stop_training_after_unit": "EPOCH",
    "huber_delta": 1.0, "loss_weight_strength": 5.0, "ema_decay": 0.999, "ema_update_step_interval": 5,
    "unmasked_weight": 0.1,
}  # fmt: skip
"""OneTrainer's own defaults where sdlora's differ."""
_PARTS = keys(
    "prior transformer unconditional_transformer text_encoder_3 text_encoder_4 effnet_encoder decoder "
    "decoder_text_encoder decoder_vqgan",
)
_OPAQUE = (
    *_PARTS, "quantization", "cloud", "secrets", "embedding", "optimizer_defaults", "optimizer.muon_adam_config",
    "scheduler_params", "concept_stats",
)  # fmt: skip
ARGUMENTS = keys(
    "eps beta3 d0 d_coef growth_rate decouple amsgrad clip_threshold decay_rate r relative_step scale_parameter "
    "warmup_init weight_lr_power",
)
OTHER_ARGUMENTS = keys(
    "adam_w_mode alpha bias_correction block_wise capturable centered dampening differentiable eps2 foreach "
    "fsdp_in_use fused fused_back_pass initial_accumulator_value initial_accumulator is_paged log_every lr_decay "
    "max_unorm min_8bit_size quant_block_size momentum no_prox optim_bits percentile_clipping safeguard_warmup "
    "stochastic_rounding use_bias_correction use_triton decoupled_decay fixed_decay weight_decouple "
    "degenerated_to_sgd k xi n_sma_threshold ams_bound adanorm adam_debias slice_p weight_decay_by_lr prodigy_steps "
    "use_speed split_groups split_groups_mean factored factored_fp32 use_stableadamw use_cautious use_grams use_adopt "
    "d_limiter use_schedulefree use_orthograd nnmf_factor orthogonal_gradient use_atan2 use_AdEMAMix beta3_ema "
    "alpha_grad beta1_warmup min_beta1 Simplified_AdEMAMix kourkoutas_beta schedulefree_c ns_steps MuonWithAuxAdam "
    "muon_hidden_layers muon_adam_regex muon_adam_lr muon_te1_adam_lr muon_te2_adam_lr muon_adam_config rms_rescaling "
    "normuon_variant beta2_normuon low_rank_ortho ortho_rank accelerated_ns cautious_wd approx_mars auto_kappa_p "
    "compile",
)


def read(document: Mapping[str, Any], folder: Path) -> Source:
    """The settings with a row for every concept that is in use, and for every sample.

    Args:
        document: The JSON file's object.
        folder: The file's folder, where its lists of concepts and samples may be.
    """
    plain = {key: value for key, value in document.items() if key not in ("concepts", "samples")}
    values = {key: value for key, value in flatten(plain, _OPAQUE).items() if not key.endswith("__version")}
    source = Source(FORM, values, defaults=DEFAULTS)
    for key, named in (("concepts", "concept_file_name"), ("samples", "sample_definition_file_name")):
        entries = document.get(key)
        if not isinstance(entries, list):
            entries = _entries(plain.get(named), folder)
        rows = [flatten(entry, _OPAQUE) for entry in entries if isinstance(entry, dict)]
        source.rows[key] = [row for row in rows if row.get("enabled", True)]
        if key in document and not source.rows[key]:
            source.decided[key] = dropped("none in use")
        if named in plain:
            source.decided[named] = dropped("read" if rows else "not on this computer, or empty")
    return source


def _is_on(value: Any) -> bool:
    return text(value) not in ("OFF", "False")


def _entries(named: Any, folder: Path) -> list[Any]:
    if not isinstance(named, str) or not named:
        return []
    for path in (Path(named), folder / named, folder.parent / named):
        try:
            found = json.loads(read_text(path))
        except (OSError, ValueError, RecursionError):
            continue
        return found if isinstance(found, list) else []
    return []


_PREVIEWS = "sdlora draws previews from the base model and after every epoch"
_SAVED = "sdlora saves every epoch, and a checkpoint to resume from"
_AUGMENT = "sdlora trains images as they are, cropped from the middle"
_UNCHANGED = "does not change the result"
_WITH_SWITCH = "only with its switch"

_MODEL = table(
    {
        "training_method": compute(take.method, "dropped if LORA, otherwise refused"),
        "model_type": compute(
            take.model_type, "`base.family`, `base.prediction_type` of 2.x at 768 px; other families are refused"
        ),
        "base_model_name": compute(lambda value, source: base_path(value), "`base.path`"),
        "vae.model_name": VAE,
        "force_v_prediction": switch({"base.prediction_type": "v_prediction"}),
        "force_epsilon_prediction": switch({"base.prediction_type": "epsilon"}),
        "unet.weight_dtype": compute(take.weights, "`base.quantization`"),
        keys("text_encoder_layer_skip text_encoder_2_layer_skip"): compute(take.layer_skip, "`base.clip_skip`"),
        "peft_type": compute(take.peft_type, "dropped if LORA, otherwise refused"),
        "layer_filter_preset": compute(take.layers, "`lora.targets`"),
        keys("layer_filter layer_filter_regex"): part_of("layer_filter_preset"),
        "unet.train": part_of("layer_filter_preset"),
        "text_encoder.train": compute(take.encoder_train, "`lora.targets`"),
        "text_encoder_2.train": compute(take.encoder_two, "`lora.targets`"),
        "lora_rank": rename("lora.rank", whole),
        "lora_alpha": rename("lora.alpha", number),
        "lora_decompose": compute(take.dora, "`lora.dora`"),
        keys("lora_decompose_norm_epsilon lora_decompose_output_axis"): part_of("lora_decompose"),
        "dropout_probability": rename("lora.dropout", number),
        "lora_model_name": CONTINUED,
        "lora_weight_dtype": drop("sdlora keeps the adapter in float32"),
        keys(
            "lokr_dim lokr_decompose_both lokr_decompose_factor lokr_use_tucker lokr_weight_decompose "
            "lokr_dora_on_output lokr_full_matrix lokr_vec_trick oft_block_size oft_block_share oft_scaled",
        ): drop("of another type of adapter"),
        "bundle_additional_embeddings": drop("sdlora trains no embeddings"),
        "additional_embeddings": refuse("sdlora trains no embeddings"),
        keys("embedding embedding_learning_rate embedding_weight_dtype preserve_embedding_norm"): drop(
            "only for training embeddings"
        ),
        _PARTS: drop("of other model families"),
        keys("quantization"): drop("sdlora quantizes the attention blocks, with base.quantization"),
    }
)
_DATA = table(
    {
        "concepts.path": compute(take.data, "`data.folder` or `data.sets`, `data.validation_folder`", "all"),
        keys("concepts.balancing concepts.balancing_strategy concepts.include_subdirectories"): part_of(
            "concepts.path"
        ),
        "concepts.type": compute(take.concept_type, "read with `concepts.path`; prior prediction is refused", "all"),
        keys("concepts.enabled concepts.name concepts.seed concepts.concept_stats"): drop("of the program itself"),
        keys("concepts.image_variations concepts.text_variations"): drop("sdlora varies captions at every exposure"),
        "concepts.loss_weight": refuse("sdlora weights all images alike; see repeats", off=(None, "", 1, 1.0)),
        "concepts.image.enable_crop_jitter": drop("sdlora crops the little that is over from the middle"),
        keys(
            "enable_fixed_flip enable_random_rotate enable_fixed_rotate enable_random_brightness "
            "enable_fixed_brightness enable_random_contrast enable_fixed_contrast enable_random_saturation "
            "enable_fixed_saturation enable_random_hue enable_fixed_hue enable_random_circular_mask_shrink "
            "enable_random_mask_rotate_crop",
            "concepts.image",
        ): refuse(_AUGMENT),
        "concepts.image.enable_random_flip": switch(
            {"data.flip": True}, "mirrored at every second exposure, not by chance"
        ),
        "concepts.image.enable_resolution_override": refuse("set resolutions_px of the set in data.sets"),
        keys(
            "concepts.image.resolution_override concepts.image.random_rotate_max_angle "
            "concepts.image.random_brightness_max_strength concepts.image.random_contrast_max_strength "
            "concepts.image.random_saturation_max_strength concepts.image.random_hue_max_strength",
        ): drop(_WITH_SWITCH),
        "concepts.text.prompt_source": refuse("sdlora reads NAME.txt and metadata.jsonl", off=(None, "", "sample")),
        "concepts.text.prompt_path": drop("only with another prompt_source"),
        "concepts.text.enable_tag_shuffling": rename("data.shuffle_tags", flag),
        "concepts.text.keep_tags_count": rename("data.keep_tags", whole),
        "concepts.text.tag_delimiter": refuse("sdlora splits tags at commas", off=(None, "", ",", ", ")),
        "concepts.text.tag_dropout_enable": refuse(
            "set data.tag_dropout to the probability, and data.protected_tags to the special tags"
        ),
        keys(
            "concepts.text.tag_dropout_mode concepts.text.tag_dropout_probability "
            "concepts.text.tag_dropout_special_tags_mode concepts.text.tag_dropout_special_tags "
            "concepts.text.tag_dropout_special_tags_regex",
        ): part_of("concepts.text.tag_dropout_enable"),
        "concepts.text.caps_randomize_enable": refuse("sdlora does not change captions in this way"),
        keys(
            "concepts.text.caps_randomize_mode concepts.text.caps_randomize_probability "
            "concepts.text.caps_randomize_lowercase",
        ): part_of("concepts.text.caps_randomize_enable"),
        keys("concept_file_name concepts"): drop("read"),
        "resolution": compute(take.resolution_of, "`data.resolution_px`, or `data.resolutions_px`"),
        "aspect_ratio_bucketing": rename("data.buckets", flag),
        "text_encoder.dropout_probability": compute(take.caption_dropout, "`data.caption_dropout`"),
        "text_encoder_2.dropout_probability": part_of("text_encoder.dropout_probability"),
        keys("text_encoder_sequence_length text_encoder_2_sequence_length frames"): drop("of other model families"),
        "masked_training": compute(take.masks, "`data.masks`, `loss.mask_floor`"),
        "unmasked_weight": part_of("masked_training"),
        "unmasked_probability": drop("only for inpainting models"),
        "normalize_masked_area_loss": refuse("sdlora does not weight images by the area of their masks"),
        "masked_prior_preservation_weight": refuse("sdlora has loss.mask_floor only"),
        "custom_conditioning_image": drop("only for inpainting models"),
        "validation": rename("data.validation_split", flag),
        keys("validate_after validate_after_unit"): drop("the validation loss is measured after every epoch"),
        keys("latent_caching clear_cache_before_training only_cache cache_dir"): drop("sdlora always caches"),
        "force_circular_padding": refuse("sdlora does not pad images in a circle"),
    }
)
_TRAINING = table(
    {
        "epochs": compute(take.epochs, "`train.epochs`, with `data.repeats`"),
        "batch_size": rename("train.batch_size", whole),
        "gradient_accumulation_steps": rename("train.gradient_accumulation_steps", whole),
        "learning_rate": compute(take.rate, "`train.learning_rate`"),
        "unet.learning_rate": rename("train.learning_rate", number),
        "optimizer.optimizer": compute(take.optimizer_of, "`train.optimizer`, `train.weight_decay`"),
        "optimizer.weight_decay": rename("train.weight_decay", number),
        "optimizer.beta1": take.beta(0),
        "optimizer.beta2": take.beta(1),
        **{f"optimizer.{name}": take.argument_of(name) for name in ARGUMENTS},
        keys("maximize cautious nesterov rectify", "optimizer"): refuse("sdlora's optimizers do not have it"),
        tuple(f"optimizer.{name}" for name in OTHER_ARGUMENTS): drop("of another optimizer, or without effect"),
        "optimizer_defaults": drop("of optimizers that are not chosen"),
        keys("text_encoder.learning_rate text_encoder_2.learning_rate"): compute(
            take.encoder_rate, "`train.text_encoder_learning_rate`"
        ),
        "text_encoder.stop_training_after": compute(take.stop, "dropped if not before the end, otherwise refused"),
        "text_encoder.stop_training_after_unit": part_of("text_encoder.stop_training_after"),
        "learning_rate_scheduler": compute(take.schedule_of, "`train.lr_schedule`"),
        keys("learning_rate_cycles learning_rate_min_factor"): part_of("learning_rate_scheduler"),
        keys("custom_learning_rate_scheduler scheduler_params"): refuse(
            "sdlora has schedules of its own; see train.lr_schedule"
        ),
        "learning_rate_warmup_steps": compute(take.warmup_of, "`train.warmup_steps`"),
        "learning_rate_scaler": refuse("multiply the rate yourself, and set train.learning_rate", off=(*OFF, "NONE")),
        "loss_scaler": refuse("sdlora does not scale the loss; set train.learning_rate", off=(*OFF, "NONE")),
        "clip_grad_norm": rename("train.max_grad_norm", number),
        "ema": compute(take.ema, "`train.ema_decay`"),
        keys("ema_decay ema_update_step_interval"): part_of("ema"),
        "train_dtype": compute(lambda value, source: precision(value), "`train.precision`"),
        "unet.gradient_checkpointing": rename("train.gradient_checkpointing", flag),
        "gradient_checkpointing": rename("train.gradient_checkpointing", _is_on),
        "compile": rename("train.compile", flag),
        "mse_strength": compute(take.loss, "`loss.kind`, `loss.huber_delta`"),
        keys("mae_strength log_cosh_strength huber_strength"): compute(take.loss, "`loss.kind`, `loss.huber_delta`"),
        "huber_delta": part_of("huber_strength"),
        "vb_loss_strength": drop("of other model families"),
        "loss_weight_fn": compute(take.weighting, "`loss.weighting`, `loss.gamma`"),
        "loss_weight_strength": part_of("loss_weight_fn"),
        "min_snr_gamma": MIN_SNR,
        "offset_noise_weight": rename("loss.noise_offset", number),
        keys("generalized_offset_noise perturbation_noise_weight"): refuse("sdlora's noise has loss.noise_offset only"),
        "rescale_noise_scheduler_to_zero_terminal_snr": rename("loss.zero_terminal_snr", flag),
        "min_noising_strength": rename("timesteps.min", lambda value: int(1000 * number(value))),
        "max_noising_strength": rename("timesteps.max", lambda value: int(1000 * number(value)) - 1),
        "timestep_distribution": compute(take.timesteps, "`timesteps.density`, `timesteps.mean`, `timesteps.std`"),
        keys("noising_weight noising_bias"): part_of("timestep_distribution"),
        "timestep_shift": refuse("sdlora does not shift timesteps", off=(None, "", 1, 1.0)),
        "dynamic_timestep_shifting": drop("of other model families"),
    }
)
_OTHER = table(
    {
        "samples.prompt": compute(take.samples, "`preview.prompts`, and what all samples share", "all"),
        keys(" ".join(("seed", "random_seed", *take.OF_SAMPLE)), "samples"): part_of("samples.prompt"),
        "sample_after": compute(take.sample_after, "`preview.every_steps` if sample_after_unit is STEP"),
        "sample_after_unit": part_of("sample_after"),
        keys(
            "enabled frames length text_encoder_1_layer_skip text_encoder_1_sequence_length text_encoder_2_layer_skip "
            "text_encoder_2_sequence_length text_encoder_3_layer_skip text_encoder_4_layer_skip "
            "transformer_attention_mask force_last_timestep sample_inpainting base_image_path mask_image_path",
            "samples",
        ): drop("previews are drawn as the model is trained"),
        keys("sample_definition_file_name samples"): drop("read"),
        keys(
            "sample_skip_first sample_image_format sample_video_format "
            "sample_audio_format samples_to_tensorboard non_ema_sampling",
        ): drop(_PREVIEWS),
        "output_dtype": compute(lambda value, source: file_precision(value), "`file.precision`"),
        "output_model_format": compute(take.file_format, "`file.format`"),
        "output_model_destination": rename("name", lambda value: Path(text(value).replace("\\", "/")).stem),
        keys(
            "backup_after backup_after_unit rolling_backup rolling_backup_count backup_before_save save_every "
            "save_every_unit save_after save_after_unit save_skip_first save_filename_prefix prevent_overwrites "
            "include_train_config",
        ): drop(_SAVED),
        "continue_last_backup": drop("a run of another trainer cannot be continued"),
        "tensorboard": switch({"train.trackers": ["tensorboard"]}),
        keys("tensorboard_expose tensorboard_always_on tensorboard_port"): drop(
            "sdlora writes metrics.jsonl, state.json and report.html of every run"
        ),
        keys("weight_dtype vae.weight_dtype text_encoder.weight_dtype text_encoder_2.weight_dtype"): drop(
            "sdlora encodes images and captions in float32"
        ),
        tuple(
            f"{part}.{name}"
            for part in ("unet", "text_encoder", "text_encoder_2", "vae")
            for name in (
                "include",
                "attention_mask",
                "guidance_scale",
                "offload_fraction",
                "activation_offloading",
                "train_embedding",
                "model_name",
                "stop_training_after",
                "stop_training_after_unit",
                "gradient_checkpointing",
                "dropout_probability",
                "train",
                "learning_rate",
            )
            if f"{part}.{name}" not in {*_MODEL, *_DATA, *_TRAINING}
        ): drop("of other parts or model families"),
        keys(
            "debug_mode debug_dir workspace_dir huggingface_cache_dir offline_mode multi_gpu device_indexes "
            "gradient_reduce_precision fused_gradient_reduce async_gradient_reduce async_gradient_reduce_buffer "
            "async_offloading enable_async_offloading enable_activation_offloading layer_offload_fraction "
            "dataloader_threads train_device temp_device fallback_train_dtype enable_autocast_cache "
            "attention_mechanism cloud secrets",
        ): drop(_UNCHANGED),
    }
)
RULES: dict[str, Rule] = _MODEL | _DATA | _TRAINING | _OTHER
