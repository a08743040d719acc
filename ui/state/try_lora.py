"""Trying a LoRA: images of a prompt with any epoch at any strength, on a base that stays loaded.

One image is drawn at a time, whoever asks.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from sdlora.config.schema import RunConfig
from sdlora.lora_files.attach import attach
from sdlora.lora_files.read import read_file
from sdlora.models.base import BaseModel
from sdlora.previews.sampler import PreviewRequest, draw
from sdlora.run.setup import choose_device, fresh_base


@dataclass(frozen=True)
class Wish:
    """What to draw.

    Attributes:
        prompt: In words.
        seed: Of the starting noise.
        strengths: How much of the LoRA, 0 is the base and 1 what was trained; an image for each.
    """

    prompt: str
    seed: int
    strengths: tuple[float, ...] = (1.0,)


class Easel:
    """Draws with LoRA files; keeps the last base in memory."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: tuple[object, ...] = ()
        self._base: BaseModel | None = None

    def draw(self, config: RunConfig, lora: Path | None, wish: Wish) -> list[Image.Image]:
        """Draw a prompt once for every strength.

        Args:
            config: The run's: its base, and how its previews are drawn.
            lora: The file to draw with; None is the base alone.
            wish: What to draw.

        Raises:
            SdloraError: The base or the file cannot be loaded.
        """
        preview = config.preview
        request = PreviewRequest(
            (wish.prompt,), (wish.seed,), preview.negative_prompt, preview.num_steps, preview.guidance
        )
        with self._lock:
            base = self._load(config)
            if lora is None:
                return [_one(base, request) for _ in wish.strengths]
            adapter = attach(base.unet, read_file(lora), text_encoders=base.text_encoders)
            try:
                images = []
                for strength in wish.strengths:
                    adapter.set_strength(strength)
                    images.append(_one(base, request))
                return images
            finally:
                adapter.remove()

    def _load(self, config: RunConfig) -> BaseModel:
        device, dtype, _ = choose_device(config)
        wanted = (config.base, config.data.max_token_windows, device, dtype, config.loss.zero_terminal_snr)
        if self._base is None or wanted != self._known:
            self._base, self._known = None, ()  # let go of the old one before there are two
            self._base, self._known = fresh_base(config, device, dtype), wanted
        return self._base


def _one(base: BaseModel, request: PreviewRequest) -> Image.Image:
    (images,) = draw(base, request, request.wanted())
    return images[0]
