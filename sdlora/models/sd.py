"""Stable Diffusion 1.x: one CLIP text encoder, read at its last layer unless another is chosen.

Shapes: B batch, N windows, L tokens (77), D text width.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType

from diffusers import DiffusionPipeline

from sdlora.errors import ConfigError
from sdlora.models.architectures import ARCHITECTURES
from sdlora.models.base import TextEmbeddings
from sdlora.models.unet import UnetModel, tokens_in_windows


class StableDiffusion(UnetModel):
    """Stable Diffusion 1.x.

    Raises:
        ConfigError: The text encoder has fewer layers than `clip_skip`.
    """

    names = ARCHITECTURES["sd1"]
    architecture = "stable-diffusion-v1"
    optional_parts = MappingProxyType(
        {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    )
    _layer = 1
    """The text encoder's layer to read, counted from the last (1)."""

    def _check_family(self, pipeline: DiffusionPipeline) -> None:
        clip_skip, num_layers = self.text.clip_skip, pipeline.text_encoder.config.num_hidden_layers
        if clip_skip is not None and clip_skip > num_layers:
            raise ConfigError(
                f"base.clip_skip is {clip_skip}, but the text encoder of {self.path!r} has only {num_layers} layers."
            )
        self._layer = clip_skip or 1

    def encode_captions(self, captions: Sequence[str]) -> TextEmbeddings:
        """Captions to {"states": (B, N L, D)}, after the final layer norm; longer captions are cut off."""
        tokens = tokens_in_windows(self.tokenizers[0], captions, self.text.max_windows).flatten(0, 1)
        (encoder,) = self.move_text_encoders()
        output = encoder(tokens.to(self.device), output_hidden_states=self._layer > 1)
        states = output.last_hidden_state
        if self._layer > 1:
            states = getattr(encoder, "text_model", encoder).final_layer_norm(output.hidden_states[-self._layer])
        return {"states": states.reshape(len(captions), -1, states.shape[-1])}
