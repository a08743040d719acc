"""The families' true shapes, as configurations of diffusers' and transformers' classes: pure data.

Checkpoints in one file are completed from here, and the memory estimate counts with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Family = Literal["sd1", "sd2", "sdxl"]


@dataclass(frozen=True)
class Architecture:
    """One family of base models."""

    title: str  # its common name
    modelspec: str  # its ModelSpec name, such as "stable-diffusion-v1"; for SD 2.x the prefix
    base_version: str  # the value of `ss_base_model_version` in A1111
    pipeline: str  # diffusers' class
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


def family_named(modelspec: str) -> Architecture:
    """The family of a ModelSpec architecture name such as "stable-diffusion-v2-768-v"."""
    return next(family for family in ARCHITECTURES.values() if modelspec.startswith(family.modelspec))
