"""The families' true shapes, as configurations of diffusers' and transformers' classes, and the family of a checkpoint.

Checkpoints in one file are completed from here and from their own shapes, and the memory estimate counts with it. The
family is told by the names and shapes in the file's header: a base model has gigabytes, its header a few hundred
kilobytes. File names are not trusted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from sdlora.common.families import Family
from sdlora.diffusion.noise import PredictionType
from sdlora.errors import BaseModelError
from sdlora.models.shapes import ShapeError, part, text_config, unet_config, vae_config

_MAX_HEADER_BYTES = 100 << 20
_PICKLED = (".ckpt", ".pt", ".pth", ".bin")
_UNET = "model.diffusion_model."
_VAE_PREFIX = "first_stage_model."
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
    ("cap_embedder.", f"{_UNET}cap_embedder."): "Lumina 2, or an incomplete transformer of Z-Image",
    ("joint_blocks.", f"{_UNET}joint_blocks."): "Stable Diffusion 3",
    ("double_layers.",): "AuraFlow",
    ("control_model.", "controlnet_"): "a ControlNet",
    ("emb_params", "clip_g", "clip_l", "string_to_param"): "a textual inversion",
    ("down_blocks.", "up_blocks."): "a UNet alone",
    ("encoder.down.", "decoder.up."): "a VAE alone",
    ("text_model.", "transformer.text_model."): "a text encoder alone",
}


@dataclass(frozen=True)
class FamilyNames:
    """What a family of base models is called, here and elsewhere."""

    title: str  # its common name
    modelspec: str  # its ModelSpec name, such as "stable-diffusion-v1"; for SD 2.x the prefix
    base_version: str  # the value of `ss_base_model_version` in A1111
    pipeline: str  # diffusers' class
    implementation: str = "https://github.com/Stability-AI/generative-models"  # its authors' code, for ModelSpec
    presets: str | None = None  # what the names of its presets begin with
    # Before the paths of layers in LoRA files whose B includes alpha / r; None for kohya's names with their alphas.
    lora_prefix: str | None = None
    lora_mark: str = r"(?!)"  # a pattern of kohya's module names that only its LoRA files have
    lora_width: int | None = None  # a width of its layers, where another family's have the same names
    lora_parts: str = r"(?!)"  # a pattern of the parts of its module paths, which kohya's names join by underscores
    # Patterns of its authors' module paths to diffusers', several where the authors fuse layers.
    lora_authors: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Architecture(FamilyNames):
    """A family with a UNet, and its true shape."""

    unet: dict[str, Any]  # the configuration of its UNet2DConditionModel, where it differs from the class's defaults
    vae: dict[str, Any]  # the same of its AutoencoderKL
    text_encoders: tuple[dict[str, Any], ...]  # the same of its CLIP text encoders, CLIPTextConfig's values
    scheduler: dict[str, Any]  # the same of its scheduler, with the class under "_class_name"

    @property
    def text_width(self) -> int:
        """The width of the text embeddings that cross-attention takes."""
        width: int = self.unet["cross_attention_dim"]
        return width


def _clip(
    width: int, num_layers: int, num_heads: int, activation: str, projection: int, padding: int
) -> dict[str, Any]:
    return {
        "vocab_size": 49408,
        "max_position_embeddings": 77,
        "bos_token_id": 49406,
        "eos_token_id": 49407,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "hidden_act": activation,
        "projection_dim": projection,
        "pad_token_id": padding,
    }


_CLIP_L = _clip(768, 12, 12, "quick_gelu", 768, 49407)
# The encoder has 24 layers; Stable Diffusion 2.x reads the second to last, so the last is left out.
_OPENCLIP_H = _clip(1024, 23, 16, "gelu", 512, 0)
_OPENCLIP_BIGG = _clip(1280, 32, 20, "gelu", 1280, 0)
_VAE: dict[str, Any] = {
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "latent_channels": 4,
}
_SCHEDULE: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "prediction_type": "epsilon",
}
_DDIM: dict[str, Any] = {"_class_name": "DDIMScheduler", **_SCHEDULE, "clip_sample": False, "set_alpha_to_one": False}

ARCHITECTURES: dict[Family, Architecture] = {
    "sd1": Architecture(
        title="Stable Diffusion 1.x",
        modelspec="stable-diffusion-v1",
        base_version="sd_v1",
        pipeline="StableDiffusionPipeline",
        presets="sd15",
        unet={
            "sample_size": 64,
            "block_out_channels": [320, 640, 1280, 1280],
            "cross_attention_dim": 768,
            "attention_head_dim": 8,
        },
        vae={**_VAE, "sample_size": 512, "scaling_factor": 0.18215},
        text_encoders=(_CLIP_L,),
        scheduler=_DDIM,
    ),
    "sd2": Architecture(
        title="Stable Diffusion 2.x",
        modelspec="stable-diffusion-v2",
        base_version="sd_v2",
        pipeline="StableDiffusionPipeline",
        unet={
            "sample_size": 96,
            "block_out_channels": [320, 640, 1280, 1280],
            "cross_attention_dim": 1024,
            "attention_head_dim": [5, 10, 20, 20],
            "use_linear_projection": True,
            # Its attention scores overflow in fp16.
            "upcast_attention": True,
        },
        vae={**_VAE, "sample_size": 768, "scaling_factor": 0.18215},
        text_encoders=(_OPENCLIP_H,),
        scheduler={**_DDIM, "prediction_type": "v_prediction"},
    ),
    "sdxl": Architecture(
        title="Stable Diffusion XL",
        modelspec="stable-diffusion-xl-v1-base",
        base_version="sdxl_base_v1-0",
        pipeline="StableDiffusionXLPipeline",
        presets="sdxl",
        unet={
            "sample_size": 128,
            "block_out_channels": [320, 640, 1280],
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "transformer_layers_per_block": [1, 2, 10],
            "cross_attention_dim": 2048,
            "attention_head_dim": [5, 10, 20],
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        vae={**_VAE, "sample_size": 1024, "scaling_factor": 0.13025},
        text_encoders=(_CLIP_L, _OPENCLIP_BIGG),
        scheduler={"_class_name": "EulerDiscreteScheduler", **_SCHEDULE, "timestep_spacing": "leading"},
    ),
}


@dataclass(frozen=True)
class Header:
    """What a safetensors file holds, without its data."""

    shapes: dict[str, tuple[int, ...]]  # by name
    metadata: dict[str, str]
    dtypes: dict[str, str]  # as the file spells them, such as "F16", by name
    starts: dict[str, int]  # the offset of every tensor's data in the file, in bytes, by name

    def has(self, *beginnings: str) -> bool:
        """Whether the name of any tensor starts with one of these."""
        return any(name.startswith(beginnings) for name in self.shapes)


def read_header(file: Path) -> Header:
    """Read a header and check that the file is complete.

    Raises:
        BaseModelError: The file is a pickled checkpoint, not a safetensors file, or truncated.
    """
    if file.suffix.lower() in _PICKLED:
        raise BaseModelError(
            f"{file.name} is a pickled checkpoint, which can run code when it is opened; sdlora reads only "
            ".safetensors files. Look for one on the page it came from, or convert it: in A1111, use the "
            "Checkpoint Merger tab with the format safetensors; in Python, run "
            "weights = torch.load(FILE, weights_only=True) and "
            "safetensors.torch.save_file(weights.get('state_dict', weights), NEW_FILE)."
        )
    size = file.stat().st_size
    with file.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        if not 2 <= length <= _MAX_HEADER_BYTES:
            raise BaseModelError(f"{file.name} is not a safetensors file. Use a checkpoint that ends in .safetensors.")
        if length + 8 > size:
            raise _cut_off(file, size, length + 8)
        text = handle.read(length)
    try:
        entries = json.loads(text)
        metadata = {str(key): str(value) for key, value in entries.pop("__metadata__", {}).items()}
        shapes = {name: tuple(entry["shape"]) for name, entry in entries.items()}
        dtypes = {name: str(entry["dtype"]) for name, entry in entries.items()}
        starts = {name: 8 + length + int(entry["data_offsets"][0]) for name, entry in entries.items()}
        end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        numbers = [*starts.values(), end, *(size for shape in shapes.values() for size in shape)]
        if not all(isinstance(number, int) and 0 <= number < 2**63 for number in numbers):
            raise ValueError("a shape or a place in the file is no number")
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise BaseModelError(f"{file.name} is not a safetensors file: its header cannot be read ({error}).") from error
    if 8 + length + end > size:
        raise _cut_off(file, size, 8 + length + end)
    return Header(shapes, metadata, dtypes, starts)


def _cut_off(file: Path, size: int, promised: int) -> BaseModelError:
    return BaseModelError(
        f"{file.name} is truncated: it has {size:,} bytes of at least {promised:,}. Download or copy it again."
    )


class Identified(NamedTuple):
    """What a checkpoint is; its prediction type is None where the file does not say, its shapes are the file's own."""

    family: Family
    prediction_type: PredictionType | None
    zero_terminal_snr: bool
    architecture: Architecture


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
    shapes = architecture_of(header, family, name)
    return Identified(family, _prediction_type(header, family), "ztsnr" in header.shapes, shapes)


def architecture_of(header: Header, family: Family, name: str) -> Architecture:
    """The shapes of a checkpoint of a family, which may be smaller or larger than its authors' own.

    Raises:
        BaseModelError: They are none of the family's.
    """
    architecture, tensors = ARCHITECTURES[family], header.shapes
    try:
        texts = [
            text_config(part(tensors, beginning), config)
            for beginning, config in zip(TEXT_ENCODERS[family], architecture.text_encoders, strict=True)
        ]
        unet = unet_config(part(tensors, _UNET), architecture.unet, texts[-1]["projection_dim"])
        vae = vae_config(part(tensors, _VAE_PREFIX), architecture.vae)
        widths = [config["hidden_size"] for config in texts]
        if len(set(widths)) < len(widths):  # diffusers tells them apart by it
            raise ShapeError(f"its two text encoders have the same width ({widths[0]})")
        width = sum(widths)
        if width != unet["cross_attention_dim"]:
            raise ShapeError(
                f"its UNet takes text of width {unet['cross_attention_dim']}, and its text encoders give {width}"
            )
    except (ShapeError, ValueError, IndexError, ArithmeticError) as error:
        reason = error if isinstance(error, ShapeError) else "a tensor has another number of dimensions"
        raise BaseModelError(
            f"{name} has the text encoders of {architecture.title}, but not its shapes: {reason}. If it is a variant "
            "of its family, convert it to a diffusers folder with its own configuration files."
        ) from error
    return replace(architecture, unet=unet, vae=vae, text_encoders=tuple(texts))


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
        f"{name} is {kind or 'an unknown kind of file'}. sdlora reads complete checkpoints of Stable Diffusion 1.x, "
        "2.x and XL, with their text encoders and VAE, and the transformers of Z-Image and FLUX.2 klein."
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
    """Check that the text encoders and the VAE are there."""
    title = ARCHITECTURES[family].title
    if missing := [beginning for beginning in TEXT_ENCODERS[family] if not header.has(beginning)]:
        raise BaseModelError(
            f"{name} holds the UNet of {title} without its text encoder{'s' if len(TEXT_ENCODERS[family]) > 1 else ''}"
            f" (no {missing[0]}...). Use a complete checkpoint."
        )
    if not header.has(_VAE_PREFIX):
        raise BaseModelError(
            f"{name} holds the UNet of {title} without its VAE (no {_VAE_PREFIX}...). Use a complete checkpoint."
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
