"""Stable Diffusion 2.x: OpenCLIP's text encoder without its last layer; v-prediction at 768 px, epsilon at 512 px."""

from __future__ import annotations

import torch

from sdlora.models.latent_diffusion import Source
from sdlora.models.sd import StableDiffusion
from sdlora.models.text import TextOptions, refuse_clip_skip


class StableDiffusion2(StableDiffusion):
    """Stable Diffusion 2.x: as 1.x, but its text encoder is stored without its last layer.

    Raises:
        BaseModelError: The UNet needs inputs other than latents and text, or its prediction type is unsupported.
        ConfigError: `clip_skip` chooses another layer of the text encoder.
    """

    def __init__(self, source: Source, *, device: torch.device, dtype: torch.dtype, text: TextOptions) -> None:
        super().__init__(source, device=device, dtype=dtype, text=text)
        predicts_v = self.prediction_type == "v_prediction"
        self.architecture = "stable-diffusion-v2-768-v" if predicts_v else "stable-diffusion-v2-512"

    def _choose_layer(self, source: Source, text: TextOptions) -> int:
        refuse_clip_skip(text.clip_skip, "Stable Diffusion 2.x")
        return 1
