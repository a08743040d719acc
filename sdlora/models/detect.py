"""The family of a checkpoint in one file, from the tensor names and shapes in its header.

File names are not trusted.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from sdlora.diffusion.noise import PredictionType
from sdlora.errors import BaseModelError
from sdlora.models.architectures import ARCHITECTURES, Family
from sdlora.models.safetensors_header import Header, read_header

_UNET = "model.diffusion_model."
_VAE = "first_stage_model."
# Prefixes of the text encoders' tensor names, in the order of diffusers' pipelines.
TEXT_ENCODERS: dict[Family, tuple[str, ...]] = {
    "sd1": ("cond_stage_model.transformer.",),
    "sd2": ("cond_stage_model.model.",),
    "sdxl": ("conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."),
}
_REFINER_WIDTH = 2560
# Prefixes found only in other kinds of files, and what those are.
_OTHERS = {
    ("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_", "lora_transformer_"): "a LoRA",
    ("double_blocks.", f"{_UNET}double_blocks."): "Flux",
    ("joint_blocks.", f"{_UNET}joint_blocks."): "Stable Diffusion 3",
    ("double_layers.",): "AuraFlow",
    ("control_model.", "controlnet_"): "a ControlNet",
    ("emb_params", "clip_g", "clip_l", "string_to_param"): "a textual inversion",
    ("down_blocks.", "up_blocks."): "a UNet alone",
    ("encoder.down.", "decoder.up."): "a VAE alone",
    ("text_model.", "transformer.text_model."): "a text encoder alone",
}


def family_on_disk(path: str) -> Family | None:
    """The family of a base model by its header or configuration, without its weights; None if it is not on the disk.

    Raises:
        BaseModelError: It is a file that is no base model.
    """
    place = Path(path).expanduser()
    if place.is_file():
        return identify(read_header(place), path).family
    try:
        unet = json.loads((place / "unet" / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # a hub id, or a folder that loading it will say more about
    if unet.get("addition_embed_type") == "text_time":
        return "sdxl"
    return "sd2" if unet.get("use_linear_projection") else "sd1"


class Identified(NamedTuple):
    """What a checkpoint is; its prediction type is None where the file does not say."""

    family: Family
    prediction_type: PredictionType | None
    zero_terminal_snr: bool


def identify(header: Header, name: str) -> Identified:
    """Identify a checkpoint in its authors' layout (LDM, sgm); `name` is for messages.

    Raises:
        BaseModelError: It is something else, its UNet needs further inputs, or a part is missing.
    """
    if not header.has(_UNET + "input_blocks."):
        raise _is_something_else(header, name)
    only_second = header.has("conditioner.embedders.0.model.") and not header.has("conditioner.embedders.1.")
    if only_second or _num_inputs(header, _UNET + "label_emb.0.0.weight") == _REFINER_WIDTH:
        raise BaseModelError(
            f"{name} is the refiner of Stable Diffusion XL, which only refines finished images. Train on "
            "the base model."
        )
    channels = _num_inputs(header, _UNET + "input_blocks.0.0.weight")
    if channels != 4:
        kinds = {9: "an inpainting", 5: "a depth", 8: "an image-editing"}
        kind = kinds.get(channels, "an unsupported")
        raise BaseModelError(
            f"{name} is {kind} checkpoint: its UNet takes {channels} input channels instead of 4. Train on the base "
            "model that it was made from; the LoRA works on both."
        )
    if header.has("edm_mean"):
        raise BaseModelError(
            f"{name} uses the EDM formulation (as Playground v2.5 does), whose noise schedule sdlora does not train. "
            "Choose another base model."
        )
    family = _family(header)
    if header.has(_UNET + "label_emb.") != (family == "sdxl"):
        raise BaseModelError(f"{name} is conditioned on images (unCLIP), which sdlora does not train.")
    _check_whole(header, family, name)
    return Identified(family, _prediction_type(header, family), "ztsnr" in header.shapes)


def _is_something_else(header: Header, name: str) -> BaseModelError:
    kind = next((kind for beginnings, kind in _OTHERS.items() if header.has(*beginnings)), None)
    if kind is None and any(".lora_" in key or ".lora." in key or "_lora." in key for key in header.shapes):
        kind = "a LoRA"
    if kind == "a LoRA":
        return BaseModelError(
            f"{name} is a LoRA, not a base model. Set base.path to the model that it was trained on; `sdlora info` "
            "shows which one that is."
        )
    return BaseModelError(
        f"{name} is {kind or 'an unknown kind of file'}. sdlora trains Stable Diffusion 1.x, 2.x and XL: use a "
        "complete checkpoint of one of them, with its text encoders and its VAE."
    )


def _family(header: Header) -> Family:
    """By the kind of its text encoders or, without any, by the width of the UNet's text embeddings."""
    for family, beginnings in TEXT_ENCODERS.items():
        if any(header.has(beginning) for beginning in beginnings):
            return family
    widths = _text_widths(header)
    return next((f for f, architecture in ARCHITECTURES.items() if architecture.text_width in widths), "sd1")


def _num_inputs(header: Header, name: str) -> int:
    """How many inputs a layer has; 0 if the layer does not exist."""
    _, inputs, *_ = (*header.shapes.get(name, ()), 0, 0)
    return inputs


def _text_widths(header: Header) -> list[int]:
    """The widths of the text embeddings that the cross-attention layers take."""
    return sorted({_num_inputs(header, name) for name in header.shapes if name.endswith("attn2.to_k.weight")})


def _check_whole(header: Header, family: Family, name: str) -> None:
    """Check that the text encoders and the VAE are there, and that the UNet has the family's shape."""
    architecture = ARCHITECTURES[family]
    title = architecture.title
    if missing := [beginning for beginning in TEXT_ENCODERS[family] if not header.has(beginning)]:
        raise BaseModelError(
            f"{name} holds the UNet of {title} without its text encoder{'s' if len(TEXT_ENCODERS[family]) > 1 else ''}"
            f" (no {missing[0]}...). Use a complete checkpoint."
        )
    if not header.has(_VAE):
        raise BaseModelError(
            f"{name} holds the UNet of {title} without its VAE (no {_VAE}...). Use a complete checkpoint."
        )
    # The UNet must have the family's true shape, since its configuration is not in the file.
    expected = (architecture.unet["block_out_channels"][0], architecture.text_width)
    first, *_ = (*header.shapes.get(_UNET + "input_blocks.0.0.weight", ()), 0)
    widths = _text_widths(header)
    if (first, *widths) != expected:
        found = " and ".join(str(width) for width in (first, *widths))
        raise BaseModelError(
            f"{name} has the text encoders of {title}, but its UNet has another shape (widths {found}, "
            f"not {expected[0]} and {expected[1]}). Convert it to a diffusers folder with its own configuration files."
        )


def _prediction_type(header: Header, family: Family) -> PredictionType | None:
    stated = header.metadata.get("modelspec.prediction_type", "").lower()
    architecture = header.metadata.get("modelspec.architecture", "")
    if "v_pred" in header.shapes or stated in ("v", "v_prediction") or architecture.endswith("-v"):
        return "v_prediction"
    if stated == "epsilon" or architecture.endswith("v2-512"):
        return "epsilon"
    # SD 2.x exists with both prediction types, with the same tensor names and shapes.
    return None if family == "sd2" else "epsilon"
