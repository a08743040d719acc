"""Stable Diffusion 1.x: one CLIP text encoder, read at its last layer unless another is chosen.

Shapes: B batch, C latent channels (4), h/w latents, N windows, L tokens (77), D text width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sdlora.data.dataset import Example
from sdlora.models.base import TextEmbeddings
from sdlora.models.latent_diffusion import LatentDiffusion, Source, refuse_other_inputs
from sdlora.models.text import TextOptions, check_clip_skip, layer_embeddings, tokens_in_windows


class StableDiffusion(LatentDiffusion):
    """Stable Diffusion 1.x; see `sdlora.models.base.BaseModel` for the attributes.

    Args:
        source: The loaded pipeline.
        device: Where to compute.
        dtype: The frozen UNet's dtype.
        text: How captions are read.

    Raises:
        BaseModelError: The UNet needs inputs other than latents and text, or its prediction type is unsupported.
        ConfigError: The text encoder has fewer layers than `clip_skip`.
    """

    architecture = "stable-diffusion-v1"

    def __init__(self, source: Source, *, device: torch.device, dtype: torch.dtype, text: TextOptions) -> None:
        refuse_other_inputs(source)
        self._layer = self._choose_layer(source, text)
        super().__init__(source, device=device, dtype=dtype, text=text)

    def _choose_layer(self, source: Source, text: TextOptions) -> int:
        """The text encoder's layer to read, counted from the last (1)."""
        num_layers = source.pipeline.text_encoder.config.num_hidden_layers
        return check_clip_skip(text.clip_skip, num_layers, source.path)

    def encode_captions(self, captions: Sequence[str]) -> TextEmbeddings:
        """Captions to {"states": (B, N L, D)}; longer captions are cut off."""
        tokens = tokens_in_windows(self.tokenizers[0], captions, self.text.max_windows)
        states = layer_embeddings(self.move_text_encoders()[0], tokens.flatten(0, 1).to(self.device), self._layer)
        return {"states": states.reshape(len(captions), -1, states.shape[-1])}

    def size_conditions(self, examples: Sequence[Example]) -> TextEmbeddings:
        """Nothing: this family is not conditioned on an image's size."""
        return {}

    def prompt_embeddings(self, prompts: Sequence[str], negative_prompts: Sequence[str]) -> dict[str, Any]:
        """Keyword arguments for the pipeline in place of prompts, encoded as captions are."""
        return {
            "prompt_embeds": self.encode_captions(prompts)["states"],
            "negative_prompt_embeds": self.encode_captions(negative_prompts)["states"],
        }

    def predict(self, noisy: Tensor, timesteps: Tensor, text: TextEmbeddings) -> Tensor:
        """The UNet's prediction (B, C, h, w) in float32."""
        dtype = self.unet.dtype
        prediction: Tensor = self.unet(noisy.to(dtype), timesteps, text["states"].to(dtype), return_dict=False)[0]
        return prediction.float()
