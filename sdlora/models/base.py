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
"""What the UNet is told of captions and images: named tensors, the batch first."""


class BaseModel(Protocol):
    """A frozen base: what turns images and captions into tensors, and the network that is adapted.

    Attributes:
        architecture: ModelSpec's name of the family, such as "stable-diffusion-v1".
        path: Where it was loaded from, as the user gave it.
        unet: The network that adapters are injected into, in the compute dtype.
        revision: The commit that a hub id was resolved to, or None.
        text_encoders: The networks that captions go through, in float32, wherever they wait: to be counted and named.
        device: Where the UNet is. VAE and text encoders take turns there and are off it while neither is used.
        prediction_type: "epsilon" or "v_prediction".
        alphas_cumprod: The schedule, (1000,) float32 on `device`.
        resolution_px: The edge length it was trained at, in pixels.
        latent_factor: Pixels per latent, along one edge.
        max_tokens: How many tokens of a caption are read, the start and end marks included.
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

    def bring_text_encoders(self) -> tuple[nn.Module, ...]:
        """The networks that captions go through, brought to the device; adapters that are trained need them there."""
        ...

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] to posterior moments (B, 2C, h, w): the mean, then the log-variance."""
        ...

    def sample_latents(self, moments: Tensor, noise: Tensor) -> Tensor:
        """Moments (B, 2C, h, w) and standard normal noise (B, C, h, w) to scaled latents (B, C, h, w)."""
        ...

    def encode_captions(self, captions: Sequence[str]) -> TextEmbeddings:
        """Captions to what `predict` takes, the batch first; gradients reach a text encoder's adapter."""
        ...

    def image_states(self, examples: Sequence[Example]) -> TextEmbeddings:
        """What `predict` takes beside the captions' states: a function of each image's size and crop alone."""
        ...

    def preview_prompts(self, prompts: Sequence[str], negative_prompts: Sequence[str]) -> dict[str, Any]:
        """What the pipeline takes in the place of prompts, encoded as captions are."""
        ...

    def num_tokens(self, caption: str) -> int:
        """How many tokens a caption needs, the start and end marks included."""
        ...

    def predict(self, noisy: Tensor, timesteps: Tensor, text: TextEmbeddings) -> Tensor:
        """The network's answer (B, C, h, w) in float32, for latents (B, C, h, w) at timesteps (B,)."""
        ...

    def use_zero_terminal_snr(self) -> None:
        """Rescale the schedule, for training and for previews, so that the highest level is pure noise."""
        ...

    def pipeline(self) -> AbstractContextManager[DiffusionPipeline]:
        """A diffusers pipeline around UNet and VAE, adapters included, for as long as the block lasts.

        It takes what `preview_prompts` gives.
        """
        ...

    def set_aside(self) -> None:
        """Take VAE and text encoders off the device; whichever is used next comes back by itself."""
        ...

    def fresh_pipeline(self) -> DiffusionPipeline:
        """The base loaded from its source once more, in float32 on the CPU, without adapters."""
        ...
