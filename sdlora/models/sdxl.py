"""Stable Diffusion XL: two text encoders side by side, a pooled text embedding, and size conditioning.

Shapes: B batch, N windows, L tokens (77), D text width (768 + 1280), P pooled width (1280).
"""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from sdlora.data.dataset import Example
from sdlora.data.images import crop_origin
from sdlora.errors import BaseModelError
from sdlora.models.architectures import ARCHITECTURES
from sdlora.models.base import TextEmbeddings
from sdlora.models.unet import UnetModel, tokens_in_windows

_NUM_SIZES = 6


class StableDiffusionXL(UnetModel):
    """Stable Diffusion XL.

    Raises:
        BaseModelError: It is the refiner.
        ConfigError: `clip_skip` chooses another layer of the text encoders.

    Source: Podell et al. 2307.01952, sections 2.1 and 2.2.
    """

    names = ARCHITECTURES["sdxl"]
    architecture = "stable-diffusion-xl-v1-base"
    text_parts = ("text_encoder", "text_encoder_2")
    optional_parts = MappingProxyType({"add_watermarker": False})

    def _check_family(self, pipeline: DiffusionPipeline) -> None:
        config, second = pipeline.unet.config, pipeline.text_encoder_2
        pooled = config.projection_class_embeddings_input_dim - _NUM_SIZES * config.addition_time_embed_dim
        if pipeline.text_encoder is None or second is None or pooled != second.config.projection_dim:
            raise BaseModelError(
                f"{self.path!r} is the refiner of Stable Diffusion XL, which only refines finished images. "
                "Train on the base model."
            )
        self._refuse_clip_skip("Stable Diffusion XL")

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
