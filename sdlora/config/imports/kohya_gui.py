"""kohya_ss, the GUI over sd-scripts: its JSON becomes sd-scripts' arguments, which `kohya` translates.

The GUI has names of its own, settings that only one type of LoRA uses, and a page for every model family.
"""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdlora.config.imports import kohya
from sdlora.config.imports.rules import (
    EMPTY,
    OFF,
    Outcome,
    Rule,
    Source,
    arguments,
    drop,
    dropped,
    keys,
    number,
    refuse,
    refused,
    switch,
    table,
)

FORM = "kohya_ss"
NAMES = {
    "LoRA_type": "network_module",
    "max_resolution": "resolution",
    "optimizer": "optimizer_type",
    "stop_text_encoder_training_pct": "stop_text_encoder_training",
    "lora_network_weights": "network_weights",
    "sdxl_cache_text_encoder_outputs": "cache_text_encoder_outputs",
    "sdxl_no_half_vae": "no_half_vae",
    **{
        name: f"network_args.{name}"
        for name in (
            "conv_dim", "conv_alpha", "down_lr_weight", "mid_lr_weight", "up_lr_weight", "block_lr_zero_threshold",
            "block_dims", "block_alphas", "conv_block_dims", "conv_block_alphas", "rank_dropout", "module_dropout",
            "loraplus_lr_ratio", "loraplus_text_encoder_lr_ratio", "loraplus_unet_lr_ratio",
        )
    },
}  # fmt: skip
"""sd-scripts' name of every setting that the GUI calls otherwise."""
_ZERO_IS_OFF = keys(
    "clip_skip max_train_epochs max_train_steps max_timestep min_timestep noise_offset seed loraplus_lr_ratio "
    "loraplus_text_encoder_lr_ratio loraplus_unet_lr_ratio",
)
_LYCORIS = keys(
    "LyCORIS_preset factor bypass_mode dora_wd use_cp use_tucker use_scalar rank_dropout_scale constrain rescaled "
    "train_norm decompose_both train_on_input unit",
)
_FLUX = keys(
    "ae clip_l t5xxl discrete_flow_shift model_prediction_type timestep_sampling split_mode train_blocks "
    "t5xxl_max_token_length enable_all_linear guidance_scale mem_eff_save apply_t5_attn_mask split_qkv train_t5xxl "
    "blocks_to_swap single_blocks_to_swap double_blocks_to_swap show_timesteps show_timesteps_resolution img_attn_dim "
    "img_mlp_dim img_mod_dim single_dim txt_attn_dim txt_mlp_dim txt_mod_dim single_mod_dim in_dims "
    "train_double_block_indices train_single_block_indices t5xxl_lr model_type train_lora_ggpo ggpo_sigma ggpo_beta "
    "cpu_offload_checkpointing flux1_cache_text_encoder_outputs flux1_cache_text_encoder_outputs_to_disk "
    "fp8_base_unet",
)
_SD3 = keys(
    "clip_g clip_g_dropout_rate logit_mean logit_std mode_scale pos_emb_random_crop_rate save_clip save_t5xxl "
    "t5xxl_device t5xxl_dtype weighting_scheme",
)
_CHECKBOXES = keys("flux1_checkbox sd3_checkbox hunyuan_image_checkbox anima_checkbox lumina_checkbox")
_PAGES = keys("flux1_ sd3_ hunyuan_ anima_ lumina_")
_LAUNCH = keys(
    "num_cpu_threads_per_process multi_gpu gpu_ids main_process_port dynamo_mode "
    "dynamo_use_fullgraph dynamo_use_dynamic extra_accelerate_launch_args",
)

OWN: dict[str, Rule] = table(
    {
        "sdxl": switch({"base.family": "sdxl"}),
        _CHECKBOXES: refuse("sdlora trains Stable Diffusion 1.x, 2.x and XL"),
        _LYCORIS: drop("only other types of LoRA use it"),
        (*_FLUX, *_SD3): drop("a setting of another model family"),
        keys("num_processes num_machines"): refuse(
            "sdlora's batch counts all processes; multiply train.batch_size, and start sdlora with torchrun",
            off=(*OFF, 1, "1"),
        ),
        _LAUNCH: drop("how processes are started does not change the result"),
        keys("dynamo_backend"): drop("sdlora compiles with train.compile, if at all"),
        keys("model_list save_as_bool no_token_padding conv_dims conv_alphas lowvram additional_parameters"): drop(
            "of the GUI itself"
        ),
    }
)
RULES: dict[str, Rule] = {**kohya.RULES, **OWN}


def read(document: Mapping[str, Any], folder: Path) -> Source:
    """The GUI's settings under sd-scripts' names.

    Args:
        document: The JSON file's object.
        folder: The file's folder, where a dataset configuration that it names may be.
    """
    gui = {key: value for key, value in document.items() if not (key in _ZERO_IS_OFF and value in OFF)}
    unused = {key: "off" for key in document if key not in gui} | _unused(gui)
    # An older name of a setting counts only where the newer one is not used.
    names = dict(NAMES)
    older = [key for key, name in NAMES.items() if key in document and name in document]
    implied: dict[str, Any] = {}
    unused |= {key: f"{NAMES[key]} goes before it" for key in older}
    _choose_length(gui, names, unused)
    _choose_warmup(gui, names, unused)
    implied |= _choose_parts(gui, unused)
    if gui.get("lr_scheduler_num_cycles") in EMPTY:
        implied["lr_scheduler_num_cycles"] = gui.get("epoch", 1)
    values: dict[str, Any] = {}
    labels: dict[str, str] = {}
    decided: dict[str, Outcome] = {}
    for key, value in document.items():
        # The names of unused settings must not meet those of others that stand for them.
        name = f"unused.{key}" if key in unused else names.get(key, key)
        values[name], labels[name] = gui.get(key, value), key
        if key in unused:
            decided[name] = dropped(unused[key])
    decided |= _add_parameters(gui.get("additional_parameters"), values, labels)
    source = kohya.of_arguments(FORM, values, folder, implied)
    source.decided |= decided
    source.labels = labels
    return source


def _unused(gui: Mapping[str, Any]) -> dict[str, str]:
    """Why settings are not used: another one switches them off, or they are of another family's page."""
    found = {key: "a setting of another model family" for key in gui if key.startswith(_PAGES)}
    found = {key: reason for key, reason in found.items() if key not in _CHECKBOXES}
    if gui.get("LoRA_type") != "Kohya LoCon":
        found |= dict.fromkeys(("conv_dim", "conv_alpha"), "only LoCon uses it")
    multires = ("multires_noise_iterations", "multires_noise_discount")
    original = ("noise_offset", "noise_offset_random_strength", "adaptive_noise_scale")
    off = original if gui.get("noise_offset_type") == "Multires" else multires
    found |= dict.fromkeys(off, "not the chosen kind of noise offset")
    found["noise_offset_type"] = "it says which of the other noise settings are used"
    found |= dict.fromkeys(
        ("stop_text_encoder_training", "stop_text_encoder_training_pct"), "the GUI itself ignores it"
    )
    if isinstance(gui.get("xformers"), str):
        found["xformers"] = "attention needs no choice: PyTorch's own is used"
    return {key: reason for key, reason in found.items() if key in gui}


def _choose_length(gui: Mapping[str, Any], names: dict[str, str], unused: dict[str, str]) -> None:
    """The GUI's epochs count unless epochs or steps are limited."""
    limit = next((key for key in ("max_train_epochs", "max_train_steps") if gui.get(key) not in OFF), None)
    if limit and "epoch" in gui:
        unused["epoch"] = f"{limit} goes before it"
    names["epoch"] = "max_train_epochs"


def _choose_warmup(gui: dict[str, Any], names: dict[str, str], unused: dict[str, str]) -> None:
    """Warmup is in per cent, unless it is given in steps."""
    if "lr_warmup" not in gui:
        return
    if gui.get("lr_warmup_steps") not in OFF:
        unused["lr_warmup"] = "lr_warmup_steps goes before it"
        return
    if "lr_warmup_steps" in gui:
        unused["lr_warmup_steps"] = "lr_warmup is given in per cent"
    names["lr_warmup"] = "lr_warmup_steps"
    with contextlib.suppress(ValueError):  # then its rule refuses it
        gui["lr_warmup"] = number(gui["lr_warmup"] or 0) / 100


def _choose_parts(gui: Mapping[str, Any], unused: dict[str, str]) -> dict[str, Any]:
    """A rate of zero says that a part is not trained, unless both are zero: then both have the general one.

    Returns:
        The value for sd-scripts.
    """
    try:
        encoder, unet = (number(gui.get(key) or 0) for key in ("text_encoder_lr", "unet_lr"))
    except ValueError:
        return {}
    for key, rate, other in (("text_encoder_lr", encoder, unet), ("unet_lr", unet, encoder)):
        if rate == 0 and key in gui:
            part = key.removesuffix("_lr").replace("_", " ")
            unused[key] = f"0: the {part} is not trained" if other else "0: learning_rate counts"
    return {
        "network_train_unet_only": encoder == 0 and unet != 0,
        "network_train_text_encoder_only": unet == 0 and encoder != 0,
    }


def _add_parameters(given: Any, values: dict[str, Any], labels: dict[str, str]) -> dict[str, Outcome]:
    """Add the command-line arguments that the GUI hands on as they are; they go before its own settings."""
    if given in EMPTY:
        return {}
    try:
        found = arguments(shlex.split(str(given)))
    except ValueError as error:
        return {"additional_parameters": refused(f"cannot be read: {error}")}
    values |= found
    labels |= {key: f"additional_parameters: {key}" for key in found}
    return {"additional_parameters": dropped("read argument by argument")}
