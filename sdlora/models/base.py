"""What training, caching and previews need of a base model, whatever its family.

A new family is one new file that satisfies `BaseModel`.
Shapes: B batch, C latent channels, H/W pixels, h/w latents, L tokens, D text width.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn

from sdlora.data.dataset import Example
from sdlora.diffusion.noise import PredictionType

TextEmbeddings = dict[str, Tensor]
"""What the network is conditioned on, beside the timestep: named tensors, batch first."""


class BaseModel(Protocol):
    """A frozen base model: encoders for images and captions, and the network that adapters train.

    Attributes:
        architecture: ModelSpec's name of the family, such as "stable-diffusion-v1".
        path: Where it was loaded from, as the user gave it.
        unet: The network that adapters are injected into, in the compute dtype.
        revision: The commit that a hub id was resolved to, or None.
        text_encoders: The networks that encode captions, in float32, on whichever device they are; to count and name.
        device: Where the UNet is. The VAE and the text encoders are there only while they are in use.
        prediction_type: "epsilon" or "v_prediction".
        alphas_cumprod: The noise schedule, (1000,) float32 on `device`.
        resolution_px: The edge length that it was trained at, in pixels.
        latent_factor: Pixels per latent along one edge.
        max_tokens: How many tokens of a caption are read, start and end tokens included.
        vae_identity: A hash of the VAE's weights and configuration, for cache keys.
        text_identity: A hash of the tokenizer and the text encoders, for cache keys.
    """

    architecture: str
    path: str
    revision: str | None
    unet: UNet2DConditionModel
    text_encoders: tuple[nn.Module, ...]
    device: torch.device
    prediction_type: PredictionType
    alphas_cumprod: Tensor
    resolution_px: int
    latent_factor: int
    max_tokens: int
    vae_identity: str
    text_identity: str

    def move_text_encoders(self) -> tuple[nn.Module, ...]:
        """The text encoders, moved to the device, where encoding and training their adapters need them."""
        ...

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] to posterior moments (B, 2C, h, w): the mean, then the log-variance."""
        ...

    def sample_latents(self, moments: Tensor, noise: Tensor) -> Tensor:
        """Moments (B, 2C, h, w) and standard normal noise (B, C, h, w) to scaled latents (B, C, h, w)."""
        ...

    def encode_captions(self, captions: Sequence[str]) -> TextEmbeddings:
        """Captions to the text embeddings that `predict` takes; gradients reach a text encoder's adapter."""
        ...

    def size_conditions(self, examples: Sequence[Example]) -> TextEmbeddings:
        """Further conditioning of `predict` that depends on each image's size and crop alone."""
        ...

    def prompt_embeddings(self, prompts: Sequence[str], negative_prompts: Sequence[str]) -> dict[str, Any]:
        """Keyword arguments for the pipeline in place of prompts, encoded as captions are."""
        ...

    def num_tokens(self, caption: str) -> int:
        """How many tokens a caption has, start and end tokens included."""
        ...

    def predict(self, noisy: Tensor, timesteps: Tensor, text: TextEmbeddings) -> Tensor:
        """The network's prediction (B, C, h, w) in float32, for noisy latents (B, C, h, w) at timesteps (B,)."""
        ...

    def use_zero_terminal_snr(self) -> None:
        """Rescale the schedule to zero terminal SNR, for training and for previews."""
        ...

    def pipeline(self) -> AbstractContextManager[DiffusionPipeline]:
        """A diffusers pipeline around UNet and VAE, adapters included, within a `with` block.

        It takes the arguments that `prompt_embeddings` returns.
        """
        ...

    def offload(self) -> None:
        """Move VAE and text encoders off the device; the next use moves them back."""
        ...

    def fresh_pipeline(self) -> DiffusionPipeline:
        """The base model in float32 on the CPU without adapters: loaded again, but for what has none."""
        ...
