"""Stable Diffusion 2.x: OpenCLIP's text encoder without its last layer; v-prediction at 768 px, epsilon at 512 px."""

from __future__ import annotations

from typing import Any

from diffusers import DiffusionPipeline

from sdlora.models.architectures import ARCHITECTURES
from sdlora.models.sd import StableDiffusion


class StableDiffusion2(StableDiffusion):
    """Stable Diffusion 2.x: as 1.x, but its text encoder is stored without its last layer.

    Raises:
        ConfigError: `clip_skip` chooses another layer of the text encoder.
    """

    names = ARCHITECTURES["sd2"]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        predicts_v = self.prediction_type == "v_prediction"
        self.architecture = "stable-diffusion-v2-768-v" if predicts_v else "stable-diffusion-v2-512"

    def _check_family(self, pipeline: DiffusionPipeline) -> None:
        self._refuse_clip_skip("Stable Diffusion 2.x")
