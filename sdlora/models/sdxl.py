"""Stable Diffusion XL: two text encoders side by side, a pooled text embedding, and size conditioning.

Shapes: B batch, C latent channels (4), h/w latents, N windows, L tokens (77), D text width (768 + 1280),
P pooled width (1280).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sdlora.data.dataset import Example
from sdlora.data.images import crop_origin
from sdlora.errors import BaseModelError
from sdlora.models.base import TextEmbeddings
from sdlora.models.latent_diffusion import LatentDiffusion, Source, refuse_other_inputs
from sdlora.models.text import TextOptions, refuse_clip_skip, tokens_in_windows

_NUM_SIZES = 6


class StableDiffusionXL(LatentDiffusion):
    """Stable Diffusion XL; see `sdlora.models.base.BaseModel` for the attributes.

    Args:
        source: The loaded pipeline.
        device: Where to compute.
        dtype: The frozen UNet's dtype; the VAE stays in float32, since it overflows in float16.
        text: How captions are read.

    Raises:
        BaseModelError: It is the refiner, the UNet needs inputs other than latents, text and sizes, or its prediction
            type is unsupported.
        ConfigError: `clip_skip` chooses another layer of the text encoders.

    Source: Podell et al. 2307.01952, sections 2.1 and 2.2.
    """

    architecture = "stable-diffusion-xl-v1-base"

    def __init__(self, source: Source, *, device: torch.device, dtype: torch.dtype, text: TextOptions) -> None:
        refuse_other_inputs(source)
        _refuse_refiner(source)
        refuse_clip_skip(text.clip_skip, "Stable Diffusion XL")
        super().__init__(source, device=device, dtype=dtype, text=text)

    def encode_captions(self, captions: Sequence[str]) -> TextEmbeddings:
        """Captions to {"states": (B, N L, D), "pooled": (B, P)}; the pooled embedding is the first window's."""
        states: list[Tensor] = []
        pooled = torch.empty(0)
        for encoder, tokenizer in zip(self.move_text_encoders(), self.tokenizers, strict=True):
            tokens = tokens_in_windows(tokenizer, captions, self.text.max_windows)
            output = encoder(tokens.flatten(0, 1).to(self.device), output_hidden_states=True)
            states.append(output.hidden_states[-2])
            pooled = output[0]  # of the last encoder: its projected end token
        both = torch.cat(states, dim=-1)
        return {
            "states": both.reshape(len(captions), -1, both.shape[-1]),
            "pooled": pooled.reshape(len(captions), self.text.max_windows, -1)[:, 0],
        }

    def size_conditions(self, examples: Sequence[Example]) -> TextEmbeddings:
        """{"sizes": (B, 6)}: height and width of the image, top and left of the crop, height and width trained."""
        rows = []
        for example in examples:
            (width, height), (to_width, to_height) = example.size_px, example.bucket
            left, top = crop_origin(example.size_px, example.bucket)
            rows.append([height, width, top, left, to_height, to_width])
        return {"sizes": torch.tensor(rows, dtype=torch.float32)}

    def prompt_embeddings(self, prompts: Sequence[str], negative_prompts: Sequence[str]) -> dict[str, Any]:
        """Keyword arguments for the pipeline in place of prompts, encoded as captions are."""
        wanted, unwanted = self.encode_captions(prompts), self.encode_captions(negative_prompts)
        return {
            "prompt_embeds": wanted["states"],
            "pooled_prompt_embeds": wanted["pooled"],
            "negative_prompt_embeds": unwanted["states"],
            "negative_pooled_prompt_embeds": unwanted["pooled"],
        }

    def predict(self, noisy: Tensor, timesteps: Tensor, text: TextEmbeddings) -> Tensor:
        """The UNet's prediction (B, C, h, w) in float32."""
        dtype = self.unet.dtype
        conditions = {"text_embeds": text["pooled"].to(dtype), "time_ids": text["sizes"]}
        prediction: Tensor = self.unet(
            noisy.to(dtype), timesteps, text["states"].to(dtype), added_cond_kwargs=conditions, return_dict=False
        )[0]
        return prediction.float()


def _refuse_refiner(source: Source) -> None:
    config = source.pipeline.unet.config
    pooled = config.projection_class_embeddings_input_dim - _NUM_SIZES * config.addition_time_embed_dim
    second = source.pipeline.text_encoder_2
    if source.pipeline.text_encoder is None or second is None or pooled != second.config.projection_dim:
        raise BaseModelError(
            f"{source.path!r} is the refiner of Stable Diffusion XL, which only refines finished images. "
            "Train on the base model."
        )
