"""ai-toolkit (ostris): a job in YAML or JSON, of which the first process is translated.

One table over `rules` and `shared`. Keys are written as paths, such as "process.network.linear".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sdlora.config.imports import ai_toolkit_values as take
from sdlora.config.imports.lora_files import CONTINUED, MERGED
from sdlora.config.imports.previews import every_steps, preview_edge, sampler
from sdlora.config.imports.rules import (
    OFF,
    Rule,
    Source,
    always,
    compute,
    drop,
    flag,
    flatten,
    keys,
    number,
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
)

FORM = "ai-toolkit"
DEFAULTS: dict[str, Any] = {
    "process.network.type": "lora", "process.network.linear": 4, "process.train.steps": 1000, "process.train.lr": 1e-6,
    "process.train.optimizer": "adamw", "process.train.dtype": "fp32", "process.train.gradient_checkpointing": True,
    "process.datasets.resolution": 512, "process.datasets.keep_tokens": 0, "process.save.dtype": "float16",
    "process.train.ema_config.ema_decay": 0.999, "process.network.linear_alpha": 1.0,
}  # fmt: skip
"""ai-toolkit's own defaults where sdlora's differ."""
_OTHER_PROCESSES = "adapter embedding decorator slider guidance lorm first_sample unconditional concept_slider"


def read(document: Mapping[str, Any]) -> Source:
    """The first process of a job, with a row for every dataset and every sample."""
    config = document.get("config")
    config = config if isinstance(config, dict) else {}
    processes = config.get("process")
    first, *others = processes if isinstance(processes, list) and processes else [{}]
    first = dict(first) if isinstance(first, dict) else {}
    name = str(config.get("name", ""))
    source = Source(FORM, {key: value for key, value in document.items() if key != "config"}, defaults=DEFAULTS)
    source.values |= {f"config.{key}": value for key, value in config.items() if key != "process"}
    source.rows["process.datasets"] = _rows(first.pop("datasets", None))
    for row in source.rows["process.datasets"]:
        row.setdefault("folder_path", row.get("dataset_path"))
    sample = first.get("sample")
    if isinstance(sample, dict):
        first["sample"] = {key: value for key, value in sample.items() if key != "samples"}
        source.rows["process.sample.samples"] = _rows(sample.get("samples"))
    opaque = [*keys(_OTHER_PROCESSES, "process"), *keys("model_kwargs model_paths quantize_kwargs", "process.model")]
    flat = flatten(first, opaque, "process.")
    source.values |= {
        key: value.replace("[name]", name) if isinstance(value, str) else value for key, value in flat.items()
    }
    source.always = [always("no validation images", {"data.validation_split": False})]
    if others:
        source.decided["config.process"] = refused(
            "only the first process is translated; import the others from their own file"
        )
        source.values["config.process"] = f"{len(others) + 1} processes"
    return source


def _rows(entries: Any) -> list[dict[str, Any]]:
    return [dict(entry) for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []


def _neutral(prefix: str, reason: str, **neutral: Any) -> dict[str | tuple[str, ...], Rule]:
    """Settings that are refused unless they have the value that switches them off."""
    return {f"{prefix}.{name}": refuse(reason, off=(*OFF, value)) for name, value in neutral.items()}


_AUGMENT = "sdlora trains images as they are, cropped from the middle"
_RECIPE = "sdlora has no such loss or noise"
_UNCHANGED = "does not change the result"
_FAMILIES = "sdlora trains Stable Diffusion 1.x, 2.x and XL"
_OTHERS = "of other model families, video or audio"
_LOGGED = "sdlora writes metrics.jsonl, state.json and report.html of every run"

_MODEL = table(
    {
        "job": refuse("sdlora trains LoRAs", off=("extension", "train", "custom", "")),
        "config.name": rename("name", text),
        "meta": drop("sdlora writes its own metadata and model card"),
        "process.type": refuse(
            "sdlora trains LoRAs", off=("sd_trainer", "diffusion_trainer", "ui_trainer", "train", "lora_train")
        ),
        "process.trigger_word": part_of("process.datasets.folder_path"),
        keys("training_folder device performance_log_every sqlite_db_path", "process"): drop(_UNCHANGED),
        keys(_OTHER_PROCESSES, "process"): refuse("sdlora trains LoRAs"),
        "process.model.name_or_path": compute(lambda value, source: base_path(value), "`base.path`"),
        "process.model.extras_name_or_path": compute(
            take.extras, "`base.components` of a transformer in one file; otherwise the base model's own"
        ),
        "process.model.arch": compute(take.arch, "`base.family`; other families are refused"),
        "process.model.is_xl": switch({"base.family": "sdxl"}),
        "process.model.is_v2": switch({"base.family": "sd2"}),
        keys(
            "is_v3 is_flux is_pixart is_pixart_sigma is_auraflow is_lumina2 is_ssd is_vega use_flux_cfg",
            "process.model",
        ): refuse(_FAMILIES),
        "process.model.is_v_pred": compute(take.v_prediction, "`base.prediction_type`"),
        "process.model.quantize": compute(take.quantize, "`base.quantization`"),
        "process.model.qtype": part_of("process.model.quantize"),
        keys(
            "quantize_te qtype_te quantize_kwargs text_encoder_bits accuracy_recovery_adapter",
            "process.model",
        ): drop("sdlora quantizes the UNet's attention blocks only"),
        "process.model.vae_path": VAE,
        keys("lora_path assistant_lora_path", "process.model"): MERGED,
        keys("inference_lora_path unconditional_lora_path", "process.model"): refuse(
            "sdlora draws previews with the LoRA that is trained only"
        ),
        keys("refiner_name_or_path unet_path te_name_or_path", "process.model"): refuse(
            "sdlora reads the base model as a whole, without a refiner"
        ),
        keys("use_text_encoder_1 use_text_encoder_2", "process.model"): refuse(
            "sdlora uses all of the base model's text encoders", off=(True, None, "true")
        ),
        keys("ignore_if_contains only_if_contains", "process.model"): part_of("process.network.type"),
        keys(
            "dtype vae_device vae_dtype te_device te_dtype low_vram auto_memory layer_offloading "
            "layer_offloading_transformer_percent layer_offloading_text_encoder_percent split_model_over_gpus "
            "split_model_other_module_param_count_scale compile_mode compile_fullgraph compile_dynamic "
            "cache_size_limit unet_sample_size latent_space_version experimental_xl attn_masking "
            "model_kwargs model_paths in_context refiner_start_at",
            "process.model",
        ): drop(_UNCHANGED),
        keys("compile block_compile", "process.model"): rename("train.compile", flag),
        "process.network.type": compute(take.network_type, "`lora.targets`; other kinds of adapters are refused"),
        "process.network.rank": rename("lora.rank", whole),
        "process.network.linear": compute(take.linear, "`lora.rank`"),
        keys("linear_alpha alpha", "process.network"): compute(take.alpha, "`lora.alpha`"),
        "process.network.conv": compute(take.conv, "`lora.target_ranks`, `lora.target_alphas`"),
        "process.network.conv_alpha": part_of("process.network.conv"),
        "process.network.dropout": rename("lora.dropout", number),
        keys("ignore_if_contains only_if_contains", "process.network.network_kwargs"): part_of("process.network.type"),
        "process.network.network_kwargs": drop("empty"),
        "process.network.pretrained_lora_path": CONTINUED,
        keys("lokr_full_rank lokr_factor old_lokr_format", "process.network"): part_of("process.network.type"),
        keys("lorm all_layers", "process.network"): refuse("sdlora trains plain LoRA and DoRA (lora.dora)"),
        keys("transformer_only split_multistage_loras layer_offloading", "process.network"): drop(_OTHERS),
    }
)
_D = "process.datasets"
_DATA = table(
    {
        keys("folder_path", _D): compute(take.data, "`data.folder` or `data.sets`", "all"),
        keys("dataset_path num_repeats default_caption trigger_word", _D): part_of(f"{_D}.folder_path"),
        keys("is_reg prior_reg", _D): compute(
            take.reg, "`data.preservation_folder`, `train.preservation_weight`", "all"
        ),
        keys("resolution", _D): compute(take.resolution_of, "`data.resolution_px`, or `data.resolutions_px`"),
        keys("buckets", _D): rename("data.buckets", flag),
        keys("bucket_tolerance", _D): rename("data.bucket_step_px", whole),
        keys("caption_ext", _D): refuse(
            "sdlora reads captions from NAME.txt, NAME.caption and NAME.json; rename the files",
            off=("", *keys("txt .txt caption .caption json .json")),
        ),
        keys("caption_dropout_rate", _D): rename("data.caption_dropout", number),
        keys("shuffle_tokens", _D): rename("data.shuffle_tags", flag),
        keys("keep_tokens", _D): rename("data.keep_tags", whole),
        keys("token_dropout_rate", _D): TAG_DROPOUT,
        keys("random_triggers replacements use_short_captions caption_type", _D): refuse(
            "sdlora does not change captions in this way; write the captions so"
        ),
        keys("random_triggers_max", _D): part_of(f"{_D}.random_triggers"),
        keys(
            "flip_x flip_y augments augmentations random_crop random_scale square_crop poi standardize_images",
            _D,
        ): refuse(_AUGMENT),
        keys("shuffle_augmentations replay_transforms", _D): drop("only with augmentations"),
        keys("alpha_mask", _D): compute(take.masks, "`data.masks`, `loss.mask_floor`"),
        keys("mask_path", _D): refuse(
            "copy each mask beside its image as NAME-mask.png, and set data.masks = 'file' and loss.mask_floor"
        ),
        keys("mask_min_value", _D): part_of(f"{_D}.alpha_mask"),
        keys("invert_mask", _D): refuse("sdlora trains the white part of a mask; invert the files"),
        **_neutral(
            _D,
            "sdlora weights all images alike; see repeats",
            loss_multiplier=1.0,
            network_weight=1.0,
            scale=1.0,
            batch_size=None,
        ),
        keys("type", _D): refuse("sdlora trains on images", off=("", "image")),
        keys(
            "control_path control_from_same_folder control_path_1 control_path_2 control_path_3 inpaint_path "
            "unconditional_path clip_image_path clip_image_from_same_folder do_i2v do_audio controls extra_values",
            _D,
        ): refuse("sdlora trains on images and captions, without control images"),
        keys(
            "num_controls_from_same_folder control_transparent_color full_size_control_images guidance_type "
            "clip_image_augmentations clip_image_shuffle_augmentations num_frames shrink_video_to_frames fps "
            "auto_frame_count trim_auto_frame_count_tail audio_preserve_pitch audio_normalize",
            _D,
        ): drop(_OTHERS),
        keys("diff_output_preservation diff_output_preservation_class", _D): part_of(
            "process.train.diff_output_preservation"
        ),
        keys(
            "cache_latents cache_latents_to_disk cache_tensors_to_disk cache_clip_vision_to_disk "
            "cache_text_embeddings load_image_when_caching_latents cache_latents_num_workers num_workers "
            "prefetch_factor fast_image_size debug",
            _D,
        ): drop("sdlora always caches, and needs no workers"),
    }
)
_T = "process.train"
_TRAINING = table(
    {
        keys("steps", _T): compute(take.steps, "`train.epochs`, with `data.repeats`, if images can be counted"),
        keys("batch_size", _T): rename("train.batch_size", whole),
        keys("gradient_accumulation gradient_accumulation_steps", _T): compute(
            take.accumulation, "`train.gradient_accumulation_steps`"
        ),
        keys("gradient_checkpointing", _T): rename("train.gradient_checkpointing", flag),
        keys("lr", _T): compute(take.rate, "`train.learning_rate`"),
        keys("unet_lr", _T): compute(take.unet_rate, "`train.learning_rate`"),
        keys("optimizer", _T): compute(take.optimizer_of, "`train.optimizer`, `train.weight_decay`"),
        keys("optimizer_params.weight_decay", _T): rename("train.weight_decay", number),
        **{f"{_T}.optimizer_params.{name}": take.argument_of(name) for name in optimizer_arguments()},
        keys("optimizer_params", _T): drop("empty"),
        keys("text_encoder_lr", _T): compute(take.encoder_rate, "`train.text_encoder_learning_rate`"),
        keys("train_unet train_text_encoder", _T): part_of("process.network.type"),
        keys("lr_scheduler", _T): compute(take.schedule_of, "`train.lr_schedule`"),
        keys("lr_scheduler_params.num_warmup_steps lr_scheduler_params.warmup_steps", _T): rename(
            "train.warmup_steps", whole
        ),
        keys("lr_scheduler_params lr_scheduler_params.total_iters lr_scheduler_params.T_max", _T): drop(
            "the schedule lasts as long as the training"
        ),
        keys("lr_scheduler_params.eta_min", _T): part_of(f"{_T}.lr_scheduler"),
        keys("lr_scheduler_params.num_cycles lr_scheduler_params.factor", _T): refuse(
            "sdlora's constant rate is train.learning_rate, and its restarts are train.lr_cycles", off=(*OFF, 1, 1.0)
        ),
        keys("max_grad_norm", _T): rename("train.max_grad_norm", number),
        keys("dtype", _T): compute(lambda value, source: precision(value), "`train.precision`"),
        keys("ema_config.use_ema", _T): compute(take.ema, "`train.ema_decay`"),
        keys("ema_config.ema_decay", _T): part_of(f"{_T}.ema_config.use_ema"),
        **_neutral(
            f"{_T}.ema_config", "sdlora's moving average has a decay only", use_feedback=False, param_multiplier=1.0
        ),
        keys("min_snr_gamma", _T): MIN_SNR,
        keys("snr_gamma", _T): refuse("sdlora has no weight of gamma / SNR without a limit; set loss.weighting"),
        keys("noise_offset", _T): rename("loss.noise_offset", number),
        keys("loss_type", _T): compute(take.loss, "`loss.kind`; others are refused"),
        keys("content_or_style", _T): compute(take.timesteps, "`timesteps.density`"),
        keys("max_denoising_steps", _T): rename("timesteps.min", lambda value: 999 - whole(value)),
        keys("min_denoising_steps", _T): rename("timesteps.max", lambda value: 999 - whole(value)),
        keys("noise_scheduler", _T): refuse(_FAMILIES, off=("", "ddpm", "ddim", "euler_a", "lcm")),
        keys("timestep_type next_sample_timesteps linear_timesteps linear_timesteps2", _T): drop(
            "only for flow matching"
        ),
        keys("diff_output_preservation", _T): compute(
            take.preservation, "`data.class_words`, `train.preservation_weight`"
        ),
        keys("diff_output_preservation_class diff_output_preservation_multiplier", _T): part_of(
            f"{_T}.diff_output_preservation"
        ),
        keys("blank_prompt_preservation", _T): compute(
            take.blank, "read with `process.train.diff_output_preservation`"
        ),
        keys("blank_prompt_preservation_multiplier", _T): part_of(f"{_T}.blank_prompt_preservation"),
        keys("reg_weight", _T): part_of(f"{_D}.is_reg"),
        keys("prompt_dropout_prob", _T): refuse("set data.caption_dropout, which applies to all sets"),
        **_neutral(
            _T,
            _RECIPE,
            noise_multiplier=1.0,
            target_noise_multiplier=1.0,
            random_noise_multiplier=0.0,
            random_noise_shift=0.0,
            img_multiplier=1.0,
            noisy_latent_multiplier=1.0,
            latent_multiplier=1.0,
            num_train_timesteps=1000,
            loss_target="noise",
            pred_scaler=1.0,
            optimal_noise_pairing_samples=1,
            weight_jitter=0.0,
            prompt_saturation_chance=0.0,
            max_loss=None,
            target_norm_std=None,
            diffusion_feature_extractor_path=None,
            latent_feature_extractor_path=None,
            merge_network_on_save=False,
            adapter_assist_name_or_path=None,
            start_step=None,
            validation_config=None,
            negative_prompt=None,
            content_or_style_reg="balanced",
        ),
        keys(
            "train_turbo learnable_snr_gos free_u do_signal_correction_noise do_batch_noise_correction "
            "do_signal_amplification adaptive_scaling_factor match_noise_norm short_and_long_captions "
            "short_and_long_captions_encoder_split match_adapter_assist inverted_mask_prior standardize_images "
            "standardize_latents dynamic_noise_offset do_cfg do_random_cfg correct_pred_norm t0_loss_target "
            "do_fft_loss do_prior_divergence do_paramiter_swapping force_consistent_noise blended_blur_noise "
            "do_guidance_loss do_differential_guidance do_blank_stabilization",
            _T,
        ): refuse(_RECIPE),
        keys(
            "batch_noise_correction_scale signal_amplification_strength signal_correction_noise_scale "
            "match_adapter_chance inverted_mask_prior_multiplier cfg_scale max_cfg_scale cfg_rescale "
            "correct_pred_norm_multiplier t0_velocity_equiv_weight do_fft_velocity_equiv_weight target_norm_std_value "
            "paramiter_swapping_factor latent_feature_loss_weight diffusion_feature_extractor_weight "
            "guidance_loss_target do_guidance_loss_cfg_zero guidance_loss_schedule unconditional_prompt "
            "differential_guidance_scale adapter_assist_type merge_network_on_save_strength max_negative_prompts "
            "show_turbo_outputs",
            _T,
        ): drop("only with the setting it belongs to"),
        keys(
            "switch_boundary_every audio_loss_multiplier bypass_guidance_embedding refiner_lr embedding_lr adapter_lr "
            "train_refiner",
            _T,
        ): drop(_OTHERS),
        keys(
            "xformers sdp attention_backend unload_text_encoder cache_text_embeddings single_item_batching "
            "max_loss_debug",
            _T,
        ): drop(_UNCHANGED),
        keys("skip_first_sample force_first_sample", _T): drop(
            "sdlora draws previews from the base model and after every epoch"
        ),
        keys("disable_sampling", _T): compute(take.no_previews, "`preview.enabled`"),
    }
)
_S = "process.sample"
_OTHER = table(
    {
        keys("prompts", _S): compute(take.prompts, "`preview.prompts`"),
        f"{_S}.samples.prompt": compute(take.samples, "`preview.prompts`, and what all samples share", "all"),
        keys(" ".join(take.OF_SAMPLE), f"{_S}.samples"): part_of(f"{_S}.samples.prompt"),
        keys("network_multiplier", _S): drop("read with the prompts: `lora_scale` of each"),
        keys("seed", _S): compute(take.seed, "`preview.seeds`"),
        keys("walk_seed", _S): drop("every prompt is drawn with the same seeds"),
        "process.sample.neg": take.for_all("preview.negative_prompt", text, "neg"),
        "process.sample.guidance_scale": take.for_all("preview.guidance", number, "guidance_scale"),
        "process.sample.sample_steps": take.for_all("preview.num_steps", whole, "sample_steps"),
        "process.sample.width": take.for_all("preview.width_px", preview_edge, "width"),
        "process.sample.height": take.for_all("preview.height_px", preview_edge, "height"),
        keys("sampler", _S): compute(sampler, "`preview.sampler`"),
        keys("sample_every", _S): compute(every_steps, "`preview.every_steps`"),
        keys("sample_start_step", _S): drop("sdlora draws previews from the base model and after every epoch"),
        keys(
            "guidance_rescale format adapter_conditioning_scale "
            "refiner_start_at extra_values num_frames fps do_cfg_norm samples.fps samples.num_frames samples.ctrl_img "
            "samples.ctrl_idx samples.ctrl_img_1 samples.ctrl_img_2 samples.ctrl_img_3 samples.do_cfg_norm",
            _S,
        ): drop("previews are drawn as the model is trained, as PNG"),
        "process.save.dtype": compute(lambda value, source: file_precision(value), "`file.precision`"),
        "process.save.save_format": drop("sdlora writes .safetensors"),
        keys("save_every max_step_saves_to_keep", "process.save"): drop(
            "sdlora saves every epoch, and a checkpoint to resume from"
        ),
        keys("push_to_hub hf_repo_id hf_private", "process.save"): drop("upload a finished LoRA with `sdlora push`"),
        keys("log_every verbose use_ui_logger project_name run_name", "process.logging"): drop(_LOGGED),
        "process.logging.use_wandb": switch({"train.trackers": ["wandb"]}),
    }
)
RULES: dict[str, Rule] = _MODEL | _DATA | _TRAINING | _OTHER
