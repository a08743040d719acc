"""Bases of random weights, small enough for tests."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
)

from sdlora.common.families import Family
from sdlora.models.architectures import ARCHITECTURES, Architecture
from sdlora.pocket import flow_architecture
from sdlora.pocket.architecture import build_scheduler, build_tokenizer, vocabulary

_VAE: dict[str, Any] = {
    "block_out_channels": [8, 8, 8], "down_block_types": ["DownEncoderBlock2D"] * 3, "norm_num_groups": 4,
    "up_block_types": ["UpDecoderBlock2D"] * 3, "latent_channels": 4, "layers_per_block": 1, "sample_size": 32,
}  # fmt: skip
_UNET: dict[str, Any] = {
    "sample_size": 8, "block_out_channels": [16, 32], "layers_per_block": 2, "norm_num_groups": 8,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"], "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
}  # fmt: skip


def _text(width: int, projection: int, activation: str) -> dict[str, Any]:
    return {
        "vocab_size": 49408, "hidden_size": width, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": 77, "projection_dim": projection,
        "hidden_act": activation, "bos_token_id": 49406, "eos_token_id": 49407,
    }  # fmt: skip


def _tiny(family: Family, text_width: int, unet: dict[str, Any], *text: dict[str, Any]) -> Architecture:
    real = ARCHITECTURES[family]
    vae = {**_VAE, "scaling_factor": real.vae["scaling_factor"]}
    return replace(real, unet={**_UNET, "cross_attention_dim": text_width, **unet}, vae=vae, text_encoders=text)


TINY: dict[Family, Architecture] = {
    "sd1": _tiny("sd1", 16, {"attention_head_dim": 2}, _text(16, 16, "quick_gelu")),
    "sd2": _tiny("sd2", 20, {"attention_head_dim": [2, 4], "use_linear_projection": True}, _text(20, 12, "gelu")),
    # Three levels as in the real one, the first without attention; the pooled text is 24 wide, each size 8 numbers.
    "sdxl": _tiny(
        "sdxl",
        40,
        {
            "block_out_channels": [16, 16, 32], "attention_head_dim": [2, 2, 4], "use_linear_projection": True,
            "down_block_types": ARCHITECTURES["sdxl"].unet["down_block_types"],
            "up_block_types": ARCHITECTURES["sdxl"].unet["up_block_types"],
            "transformer_layers_per_block": [1, 1, 2], "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 24 + 6 * 8,
        },
        _text(16, 16, "quick_gelu"),
        _text(24, 24, "gelu"),
    ),
}  # fmt: skip


# SDXL as a file in one holds it: widths in whole groups of norms, heads as wide as the family's, all of CLIP's words.
REDUCED_SDXL: Architecture = replace(
    ARCHITECTURES["sdxl"],
    unet={
        **ARCHITECTURES["sdxl"].unet, "block_out_channels": [32, 32, 64], "attention_head_dim": [1, 1, 1],
        "transformer_layers_per_block": [1, 1, 2], "cross_attention_dim": 96, "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 64 + 6 * 8,
    },
    vae={**ARCHITECTURES["sdxl"].vae, "block_out_channels": [32, 32, 32, 32], "layers_per_block": 1},
    text_encoders=(
        {**_text(32, 32, "quick_gelu"), "num_attention_heads": 1}, {**_text(64, 64, "gelu"), "num_attention_heads": 1},
    ),
)  # fmt: skip


def tiny_networks(family: Family, **options: Any) -> dict[str, Any]:
    """The components of a family's tiny pipeline; see `random_networks`."""
    return random_networks(TINY[family], **options)


def random_networks(architecture: Architecture, *, vocab_size: int = 49408, **unet: Any) -> dict[str, Any]:
    """The components of a pipeline with random weights.

    Args:
        architecture: Their shapes.
        vocab_size: How many words the text encoders know.
        unet: Other values of the UNet's configuration.
    """
    torch.manual_seed(0)
    kinds = (CLIPTextModel, CLIPTextModelWithProjection)
    names = ("text_encoder", "text_encoder_2")
    parts: dict[str, Any] = {
        name: kind(CLIPTextConfig(**{**config, "vocab_size": vocab_size, "eos_token_id": vocab_size - 1}))
        for name, kind, config in zip(names, kinds, architecture.text_encoders, strict=False)
    }
    for encoder in parts.values():
        _spread(encoder)
    parts["unet"] = UNet2DConditionModel.from_config({**architecture.unet, **unet})
    parts["vae"] = AutoencoderKL.from_config(architecture.vae)
    return parts


def _spread(encoder: torch.nn.Module) -> None:
    """Norms that do something: at their start the last one and none are hard to tell apart."""
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)


def make_tiny(family: Family, folder: Path, *, prediction_type: str | None = None, **unet: Any) -> None:
    """Write a family's base of random weights and 32 px, in diffusers' layout, with pocket's small vocabulary.

    Args:
        family: Which.
        folder: Where.
        prediction_type: Against the family's own.
        unet: Other values of the UNet's configuration.
    """
    settings = dict(TINY[family].scheduler)
    if prediction_type is not None:
        settings["prediction_type"] = prediction_type
    scheduler = getattr(diffusers, settings.pop("_class_name")).from_config(settings)
    first = small_tokenizer("!" if family == "sd2" else "<|endoftext|>")
    parts = tiny_networks(family, vocab_size=len(first), **unet) | {"scheduler": scheduler, "tokenizer": first}
    if family == "sdxl":
        parts |= {"tokenizer_2": small_tokenizer("!"), "add_watermarker": False}
    else:
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    getattr(diffusers, TINY[family].pipeline)(**parts).save_pretrained(folder)


def small_tokenizer(padding: str) -> CLIPTokenizer:
    """Pocket's tokenizer, filled up with a mark of its own."""
    vocab, merges = vocabulary()
    return CLIPTokenizer(vocab=vocab, merges=merges, pad_token=padding, model_max_length=77)


def make_tiny_pipeline(
    folder: Path, *, prediction_type: str = "epsilon", in_channels: int = 4, text_width: int = 16
) -> None:
    """Write a Stable Diffusion 1.x of random weights and 32 px, in diffusers' layout, with pocket's tokenizer."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer(folder / "tokenizer")
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=text_width, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=77, projection_dim=text_width,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=in_channels, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=text_width, attention_head_dim=2,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 3, norm_num_groups=4,
        up_block_types=("UpDecoderBlock2D",) * 3, latent_channels=4, layers_per_block=1, sample_size=32,
    )  # fmt: skip
    pipeline = StableDiffusionPipeline(
        vae=vae, text_encoder=CLIPTextModel(text), tokenizer=tokenizer, unet=unet, safety_checker=None,
        scheduler=DDIMScheduler.from_config(build_scheduler().config, prediction_type=prediction_type),
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.save_pretrained(folder)


WHOLE_HEADS: dict[str, Any] = {"dim": 128, "n_heads": 1, "n_kv_heads": 1, "axes_dims": [32, 48, 48]}
"""Of Z-Image, heads as wide as the true ones, which a file in one holds."""
WHOLE_HEADS_KLEIN: dict[str, Any] = {
    "attention_head_dim": 128, "num_attention_heads": 1, "axes_dims_rope": (32,) * 4, "timestep_guidance_channels": 256,
}  # fmt: skip
"""The same of klein."""


def make_tiny_z_image(folder: Path, *, seed: int = 0, **config: Any) -> None:
    """Write a Z-Image of random weights: 32 px, latents of 16 channels and factor 4, a transformer 32 wide."""
    torch.manual_seed(seed)
    tokenizer = flow_architecture.build_tokenizer()
    vae = AutoencoderKL(
        **{**_VAE, "latent_channels": 16}, scaling_factor=0.36, shift_factor=0.12, use_quant_conv=False,
        use_post_quant_conv=False,
    )  # fmt: skip
    text = Qwen3Model(
        Qwen3Config(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, head_dim=8, max_position_embeddings=512,
            pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip
    shape = {
        "in_channels": 16, "dim": 32, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2,
        "cap_feat_dim": 16, "axes_dims": [4, 6, 6], "axes_lens": [640, 64, 64],
    }  # fmt: skip
    transformer = ZImageTransformer2DModel(**(shape | config))
    for token in (transformer.x_pad_token, transformer.cap_pad_token):
        torch.nn.init.normal_(token)
    ZImagePipeline(FlowMatchEulerDiscreteScheduler(shift=3.0), vae, text, tokenizer, transformer).save_pretrained(
        folder
    )


def make_tiny_klein(folder: Path, *, is_distilled: bool = False, seed: int = 0, **config: Any) -> None:
    """Write a FLUX.2 klein of random weights: 32 px, patches of 16 channels and factor 8, a transformer 32 wide."""
    torch.manual_seed(seed)
    tokenizer = flow_architecture.build_tokenizer()
    # Qwen3's own template ends an answer's beginning without thoughts by an empty one.
    tokenizer.chat_template += "{% if enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 3, norm_num_groups=4,
        up_block_types=("UpDecoderBlock2D",) * 3, latent_channels=4, layers_per_block=1, sample_size=32,
    )  # fmt: skip
    vae.bn.running_mean.normal_(std=0.3)
    vae.bn.running_var.uniform_(0.5, 2.0)
    text = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer), hidden_size=8, intermediate_size=16, num_hidden_layers=28,
            num_attention_heads=2, num_key_value_heads=1, head_dim=4, max_position_embeddings=512,
            pad_token_id=tokenizer.pad_token_id, tie_word_embeddings=True,
        )
    )  # fmt: skip
    shape = {
        "in_channels": 16, "num_layers": 1, "num_single_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2,
        "joint_attention_dim": 24, "timestep_guidance_channels": 16, "axes_dims_rope": (4, 4, 4, 4),
        "guidance_embeds": False,
    }  # fmt: skip
    transformer = Flux2Transformer2DModel(**(shape | config))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    Flux2KleinPipeline(scheduler, vae, text, tokenizer, transformer, is_distilled=is_distilled).save_pretrained(folder)
