"""What kind of base a checkpoint in one file is, told from the names and shapes in its header.

A file's name tells nothing that is believed.
"""

from __future__ import annotations

from dataclasses import dataclass

from sdlora.diffusion.noise import PredictionType
from sdlora.errors import BaseModelError
from sdlora.models.architectures import ARCHITECTURES, Family
from sdlora.models.safetensors_header import Header

_UNET = "model.diffusion_model."
_VAE = "first_stage_model."
# What the names of their text encoders begin with, in the order of diffusers' pipelines.
TEXT_ENCODERS: dict[Family, tuple[str, ...]] = {
    "sd1": ("cond_stage_model.transformer.",),
    "sd2": ("cond_stage_model.model.",),
    "sdxl": ("conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."),
}
_REFINER_WIDTH = 2560
# Names that only files of other kinds hold, and what those are.
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


@dataclass(frozen=True)
class Recognised:
    """What a checkpoint is.

    Attributes:
        family: Its family.
        prediction_type: What it predicts, or None where the file does not tell.
        ends_in_noise: Whether it was trained on a schedule that ends in pure noise.
    """

    family: Family
    prediction_type: PredictionType | None
    ends_in_noise: bool


def recognise(header: Header, name: str) -> Recognised:
    """The family of a checkpoint in the layout of its authors (LDM, sgm).

    Args:
        header: The file's.
        name: How it is called in messages.

    Raises:
        BaseModelError: It is something else, takes other inputs than latents and text, or lacks a part.
    """
    if not header.has(_UNET + "input_blocks."):
        raise _is_something_else(header, name)
    _refuse_refiner(header, name)
    channels = _num_inputs(header, _UNET + "input_blocks.0.0.weight")
    if channels != 4:
        kinds = {9: "an inpainting", 5: "a depth", 8: "an image-editing"}
        kind = kinds.get(channels, "no plain")
        raise BaseModelError(
            f"{name} is {kind} checkpoint: its UNet takes {channels} channels instead of 4. Train on the plain model "
            "it was made from; the LoRA works on both."
        )
    if header.has("edm_mean"):
        raise BaseModelError(
            f"{name} is trained in EDM's form (as Playground v2.5 is), whose noise levels are not those of Stable "
            "Diffusion XL. Choose another base."
        )
    family = _family(header)
    if header.has(_UNET + "label_emb.") != (family == "sdxl"):
        raise BaseModelError(f"{name} takes images as prompts (unCLIP), which sdlora does not train.")
    _check_whole(header, family, name)
    _check_shapes(header, family, name)
    return Recognised(family, _prediction_type(header, family), "ztsnr" in header.shapes)


def _is_something_else(header: Header, name: str) -> BaseModelError:
    kind = next((kind for beginnings, kind in _OTHERS.items() if header.has(*beginnings)), None)
    if kind is None and any(".lora_" in key or ".lora." in key or "_lora." in key for key in header.shapes):
        kind = "a LoRA"
    if kind == "a LoRA":
        return BaseModelError(
            f"{name} is a LoRA, not a base. base.path takes the model that LoRAs are put on; what a LoRA was trained "
            "on, `sdlora info` tells."
        )
    return BaseModelError(
        f"{name} is {kind or 'of no known kind'}. sdlora trains Stable Diffusion 1.x, 2.x and XL: give a whole "
        "checkpoint of one of them, with its text encoders and its VAE."
    )


def _refuse_refiner(header: Header, name: str) -> None:
    only_second = header.has("conditioner.embedders.0.model.") and not header.has("conditioner.embedders.1.")
    if only_second or _num_inputs(header, _UNET + "label_emb.0.0.weight") == _REFINER_WIDTH:
        raise BaseModelError(
            f"{name} is the refiner of Stable Diffusion XL, which only finishes images. Train on the base model."
        )


def _family(header: Header) -> Family:
    """By what the text encoders are, or where there are none by what the UNet takes of text."""
    for family, beginnings in TEXT_ENCODERS.items():
        if any(header.has(beginning) for beginning in beginnings):
            return family
    widths = _text_widths(header)
    return next((f for f, architecture in ARCHITECTURES.items() if architecture.text_width in widths), "sd1")


def _num_inputs(header: Header, name: str) -> int:
    """How many inputs a layer takes; 0 where it is not there."""
    _, inputs, *_ = (*header.shapes.get(name, ()), 0, 0)
    return inputs


def _text_widths(header: Header) -> list[int]:
    """How wide the text states are that the layers of cross-attention take."""
    return sorted({_num_inputs(header, name) for name in header.shapes if name.endswith("attn2.to_k.weight")})


def _check_whole(header: Header, family: Family, name: str) -> None:
    title = ARCHITECTURES[family].title
    missing = [beginning for beginning in TEXT_ENCODERS[family] if not header.has(beginning)]
    if missing:
        raise BaseModelError(
            f"{name} holds the UNet of {title} without its text encoder{'s' if len(TEXT_ENCODERS[family]) > 1 else ''}"
            f" (no {missing[0]}...). Give a whole checkpoint."
        )
    if not header.has(_VAE):
        raise BaseModelError(
            f"{name} holds the UNet of {title} without its VAE (no {_VAE}...). Give a whole checkpoint."
        )


def _check_shapes(header: Header, family: Family, name: str) -> None:
    """See whether the UNet is the family's own; its configuration is not in the file."""
    architecture = ARCHITECTURES[family]
    expected = (architecture.unet["block_out_channels"][0], architecture.text_width)
    first, *_ = (*header.shapes.get(_UNET + "input_blocks.0.0.weight", ()), 0)
    widths = _text_widths(header)
    if (first, *widths) != expected:
        found = " and ".join(str(width) for width in (first, *widths))
        raise BaseModelError(
            f"{name} has text encoders like {architecture.title}, but its UNet is of another shape (widths {found}, "
            f"not {expected[0]} and {expected[1]}). Convert it to a folder in diffusers' layout, with its own configs."
        )


def _prediction_type(header: Header, family: Family) -> PredictionType | None:
    told = header.metadata.get("modelspec.prediction_type", "").lower()
    architecture = header.metadata.get("modelspec.architecture", "")
    if "v_pred" in header.shapes or told in ("v", "v_prediction") or architecture.endswith("-v"):
        return "v_prediction"
    if told == "epsilon" or architecture.endswith("v2-512"):
        return "epsilon"
    # Of 2.x there are bases of both kinds with the same weights by name and shape.
    return None if family == "sd2" else "epsilon"
