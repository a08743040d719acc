"""Trying a LoRA: images of a prompt with any epoch at any strength, on a base that stays loaded.

Called by the result page; one request is drawn at a time, whoever sends it.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from sdlora.config.schema import RunConfig
from sdlora.lora_files.pipelines import attach
from sdlora.lora_files.read import read_file
from sdlora.previews.sampler import PreviewRequest, draw
from sdlora.run.setup import BasePool, choose_device


class SampleRequest(NamedTuple):
    """What to draw: an image for each strength, of which 0 is the base and 1 the LoRA as trained."""

    prompt: str
    seed: int
    strengths: tuple[float, ...] = (1.0,)


class LoraSampler:
    """Draws images with LoRA files and keeps the last base in memory."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._bases = BasePool()

    def draw(self, config: RunConfig, lora: Path | None, sample: SampleRequest) -> list[Image.Image]:
        """Draw with the base and the preview settings of a run, and with a LoRA file, or with the base alone if None.

        Raises:
            SdloraError: The base or the file cannot be loaded.
        """
        preview = config.preview
        request = PreviewRequest(
            (sample.prompt,),
            (sample.seed,),
            preview.negative_prompt,
            preview.num_steps,
            preview.guidance,
            sampler=preview.sampler,
            size_px=(preview.width_px, preview.height_px) if preview.width_px and preview.height_px else None,
        )
        with self._lock:
            device, dtype, _ = choose_device(config.train.device, config.train.precision)
            base = self._bases(config, device, dtype)
            if lora is None:
                return [next(draw(base, request, request.wanted()))[0] for _ in sample.strengths]
            adapter = attach(base.network, read_file(lora), text_encoders=base.text_encoders)
            try:
                images: list[Image.Image] = []
                for strength in sample.strengths:
                    adapter.set_strength(strength)
                    images += next(draw(base, request, request.wanted()))
                return images
            finally:
                adapter.remove()
