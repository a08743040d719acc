"""A base model of shapes without weights, on the meta device, for estimates.

Built from the networks' configurations, so that no weight is loaded. Shapes: B batch, C latent channels, h/w latents,
L tokens, D text width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from sdlora.diffusion.noise import PredictionType
from sdlora.lora.quantize import Quantization, quantize_linears
from sdlora.models.architectures import ARCHITECTURES, Family
from sdlora.models.base import BaseModel, TextEmbeddings

META = torch.device("meta")
_POOLED_WIDTH = 1280


@dataclass(frozen=True)
class Shapes:
    """The configurations of a base model's networks, and bytes of their parameters and buffers.

    Attributes:
        unet: Of a UNet2DConditionModel of diffusers.
        vae: Of an AutoencoderKL of diffusers.
        text_encoders: Of each text encoder, as CLIPTextConfig of transformers.
    """

    unet: Mapping[str, Any]
    vae: Mapping[str, Any]
    text_encoders: tuple[Mapping[str, Any], ...]
    vae_bytes: int
    text_bytes: int

    @property
    def frozen_bytes(self) -> int:
        """VAE and text encoders together."""
        return self.vae_bytes + self.text_bytes

    @property
    def latent_factor(self) -> int:
        """Pixels per latent, along one edge."""
        return int(2 ** (len(self.vae["block_out_channels"]) - 1))

    @property
    def resolution_px(self) -> int:
        """The edge length that the base model was trained at, in pixels."""
        return int(self.unet["sample_size"]) * self.latent_factor


def shapes_of_family(family: Family) -> Shapes:
    """The shapes of a model family."""
    architecture = ARCHITECTURES[family]
    return shapes_of_configs(architecture.unet, architecture.vae, architecture.text_encoders)


def shapes_of_configs(
    unet: Mapping[str, Any], vae: Mapping[str, Any], text_encoders: Sequence[Mapping[str, Any]]
) -> Shapes:
    """The shapes of a base model from its networks' configurations, VAE and text encoders in float32."""
    with META:
        decoder = AutoencoderKL.from_config(dict(vae))
        encoders = [CLIPTextModel(CLIPTextConfig(**config)) for config in text_encoders]
    return Shapes(unet, vae, tuple(text_encoders), num_bytes(decoder), num_bytes(*encoders))


def shapes_of_base(base: BaseModel) -> Shapes:
    """The shapes of a loaded base model."""
    vae, encoders = base.vae, base.text_encoders
    texts = tuple(encoder.config.to_dict() for encoder in encoders)
    return Shapes(dict(base.unet.config), dict(vae.config), texts, num_bytes(vae), num_bytes(*encoders))


def num_bytes(*networks: nn.Module) -> int:
    """Bytes of the parameters and buffers of networks, shared ones counted once."""
    tensors = {id(t): t for n in networks for t in (*n.parameters(), *n.buffers())}
    return sum(tensor.nbytes for tensor in tensors.values())


class MetaBase:
    """Networks of given shapes on the meta device, with the part of `sdlora.models.base.BaseModel` that a loss needs.

    Type and quantization are the UNet's; text encoders are only built where they are trained.
    """

    device = META
    prediction_type: PredictionType = "epsilon"

    def __init__(
        self,
        shapes: Shapes,
        dtype: torch.dtype,
        *,
        quantization: Quantization | Literal["none"] = "none",
        text_is_trained: bool = False,
    ) -> None:
        with META:
            self.unet: UNet2DConditionModel = UNet2DConditionModel.from_config(dict(shapes.unet))
            self.vae: AutoencoderKL = AutoencoderKL.from_config(dict(shapes.vae)).eval()
            configs = shapes.text_encoders if text_is_trained else ()
            self.text_encoders = tuple(CLIPTextModel(CLIPTextConfig(**config)).eval() for config in configs)
            self.alphas_cumprod = torch.empty(1000)
        nn.Module.to(self.unet.requires_grad_(False).eval(), dtype)
        if quantization != "none":
            quantize_linears(self.unet, quantization)
        self.num_tokens = int(shapes.text_encoders[0]["max_position_embeddings"])

    def text(self, batch_size: int) -> TextEmbeddings:
        """Text embeddings as the UNet takes them, (B, L, D), through the text encoders if they are trained."""
        config = self.unet.config
        if self.text_encoders:
            tokens = torch.zeros(batch_size, self.num_tokens, dtype=torch.long, device=META)
            outputs = [encoder(tokens, output_hidden_states=True) for encoder in self.text_encoders]
            # Two encoders are read at their last layer but one, and concatenated.
            two = len(outputs) > 1
            states = torch.cat([o.hidden_states[-2] if two else o.last_hidden_state for o in outputs], dim=-1)
        else:
            states = torch.empty(batch_size, self.num_tokens, config.cross_attention_dim, device=META)
        found = {"states": states}
        if config.addition_embed_type == "text_time":
            num_sizes = (config.projection_class_embeddings_input_dim - _POOLED_WIDTH) // config.addition_time_embed_dim
            found["text_embeds"] = torch.empty(batch_size, _POOLED_WIDTH, device=META)
            found["time_ids"] = torch.empty(batch_size, num_sizes, device=META)
        return found

    def predict(self, noisy: Tensor, timesteps: Tensor, text: TextEmbeddings) -> Tensor:
        """The UNet's prediction (B, C, h, w) in float32, for latents (B, C, h, w) at timesteps (B,)."""
        dtype = self.unet.dtype
        added = {name: value.to(dtype) for name, value in text.items() if name != "states"}
        prediction: Tensor = self.unet(
            noisy.to(dtype), timesteps, text["states"].to(dtype), added_cond_kwargs=added or None, return_dict=False
        )[0]
        return prediction.float()


def empty_latents(shapes: Shapes, batch_size: int, size_px: Sequence[int]) -> Tensor:
    """Meta latents (B, C, h, w) of images of a width and a height in pixels."""
    width, height = (edge // shapes.latent_factor for edge in size_px)
    channels = shapes.unet.get("in_channels", 4)
    return torch.empty(batch_size, channels, height, width, device=META)
