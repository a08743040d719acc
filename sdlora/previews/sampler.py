"""Previews: the same prompts and seeds are drawn after every epoch, to show what the adapter has learned.

Called by `copycheck` and `run`. A diffusers pipeline draws them; the noise comes from separate generators, so training
is not disturbed.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image

from sdlora.common.files import atomic_path
from sdlora.events import Event, PreviewsDone, Progress
from sdlora.models.base import BaseModel
from sdlora.previews.guidance_norm import SamplerWatch

Kind = Literal["training", "novel"]
_PIXELS_PER_BATCH = 8 * 128 * 128
# Text encoders and VAE take turns on the device; swapping large ones takes about a second.
_BATCHES_PER_TURN = 16


@dataclass(frozen=True)
class PreviewRequest:
    """What to draw.

    Attributes:
        prompts: Each is drawn once per seed.
        seeds: Seeds of the starting noise.
        negative_prompt: What guidance steers away from.
        num_steps: Denoising steps, at least 1.
        guidance: Classifier-free guidance scale; 1 switches it off.
        num_captions: How many of the prompts, from the first, are captions of training images.
    """

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    negative_prompt: str
    num_steps: int
    guidance: float
    num_captions: int = 0

    def wanted(self) -> list[tuple[str, int]]:
        """Every image's prompt and seed, prompts first."""
        return [(prompt, seed) for prompt in self.prompts for seed in self.seeds]

    def kinds(self) -> list[Kind]:
        """The origin of every image's prompt."""
        return [
            "training" if index < self.num_captions else "novel"
            for index in range(len(self.prompts))
            for _ in self.seeds
        ]

    def file_names(self) -> list[str]:
        """One PNG per prompt and seed, prompts first."""
        return [f"prompt{p:02d}_seed{seed}.png" for p in range(len(self.prompts)) for seed in self.seeds]


def draw_epoch(
    base: BaseModel, request: PreviewRequest, epoch: int, folder: Path, watch: SamplerWatch | None = None
) -> Iterator[Event]:
    """Draw every prompt with every seed and save the images as PNG files.

    Args:
        base: The model with its adapter.
        request: What to draw.
        epoch: The epoch, for the event.
        folder: The epoch's folder; the files go into `previews`, named by `PreviewRequest.file_names`.
        watch: Observes the UNet.
    """
    start = time.monotonic()
    files = [folder / "previews" / name for name in request.file_names()]
    done = 0
    for images in draw(base, request, request.wanted(), watch):
        for image in images:
            with atomic_path(files[done]) as temporary:
                image.save(temporary, format="PNG")
            done += 1
        yield Progress("previews", done, len(files))
    yield PreviewsDone(epoch, [str(file) for file in files], time.monotonic() - start)


def draw(
    base: BaseModel, request: PreviewRequest, wanted: Sequence[tuple[str, int]], watch: SamplerWatch | None = None
) -> Iterator[list[Image.Image]]:
    """Draw images of prompts and seeds, in order and in batches.

    Args:
        base: The model with its adapter.
        request: How to draw; its own prompts and seeds are ignored.
        wanted: Prompts and seeds.
        watch: Observes the UNet.
    """
    size = max(1, _PIXELS_PER_BATCH // base.resolution_px**2)
    batches = [wanted[first : first + size] for first in range(0, len(wanted), size)]
    for first in range(0, len(batches), _BATCHES_PER_TURN):
        turn = batches[first : first + _BATCHES_PER_TURN]
        encoded = [_encode(base, request, batch) for batch in turn]
        for batch, prompts in zip(turn, encoded, strict=True):
            yield _draw(base, request, batch, prompts, watch)


def settings(base: BaseModel, request: PreviewRequest) -> list[str]:
    """Everything except prompt, seed and weights that determines an image, for cache keys."""
    with base.pipeline() as pipeline:
        scheduler = dict(pipeline.scheduler.config)
    return [
        request.negative_prompt,
        str(request.num_steps),
        str(request.guidance),
        str(base.unet.dtype),
        json.dumps(scheduler, sort_keys=True, default=str),
    ]


@torch.no_grad()
def _encode(base: BaseModel, request: PreviewRequest, batch: Sequence[tuple[str, int]]) -> dict[str, Any]:
    return base.prompt_embeddings([prompt for prompt, _ in batch], [request.negative_prompt] * len(batch))


def _draw(
    base: BaseModel,
    request: PreviewRequest,
    batch: Sequence[tuple[str, int]],
    prompts: dict[str, Any],
    watch: SamplerWatch | None,
) -> list[Image.Image]:
    # The watch's context is the inner one, so that it sees float32 predictions.
    with base.pipeline() as pipeline, watch.batch(len(batch)) if watch else nullcontext(), torch.no_grad():
        result = pipeline(
            **prompts,
            num_inference_steps=request.num_steps,
            guidance_scale=request.guidance,
            generator=[torch.Generator("cpu").manual_seed(seed) for _, seed in batch],
        )
    images: list[Image.Image] = result.images
    return images
