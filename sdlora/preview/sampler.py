"""Pictures of what the adapter has learned so far: the same prompts and seeds after every epoch.

Floor 6. A library's pipeline draws them; noise comes from generators of their own, so training is not disturbed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from sdlora.events import Progress
from sdlora.files import atomic_path
from sdlora.models.base import BaseModel
from sdlora.preview.watching import SamplerWatch

_PIXELS_PER_BATCH = 8 * 128 * 128


@dataclass(frozen=True)
class PreviewRequest:
    """What to draw.

    Attributes:
        prompts: Each is drawn once per seed.
        seeds: Seeds of the starting noise.
        negative_prompt: What guidance steers away from.
        num_steps: Denoising steps, at least 1.
        guidance: Classifier-free guidance scale; 1 switches it off.
    """

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    negative_prompt: str
    num_steps: int
    guidance: float

    def file_names(self) -> list[str]:
        """One PNG per prompt and seed, prompts first."""
        return [f"prompt{p:02d}_seed{seed}.png" for p in range(len(self.prompts)) for seed in self.seeds]


def draw_previews(
    base: BaseModel, request: PreviewRequest, folder: Path, watch: SamplerWatch | None = None
) -> Iterator[Progress]:
    """Draw every prompt with every seed and save the pictures as PNG files.

    Args:
        base: The model, its adapter as it should be seen.
        request: What to draw.
        folder: Where the files go, named by `PreviewRequest.file_names`.
        watch: Listens to the UNet meanwhile.
    """
    wanted = [(prompt, seed) for prompt in request.prompts for seed in request.seeds]
    names = request.file_names()
    size = max(1, _PIXELS_PER_BATCH // base.resolution_px**2)
    for first in range(0, len(wanted), size):
        group = wanted[first : first + size]
        for name, picture in zip(names[first:], _draw(base, request, group, watch), strict=False):
            with atomic_path(folder / name) as temporary:
                picture.save(temporary, format="PNG")
        yield Progress("previews", min(first + size, len(wanted)), len(wanted))


def _draw(
    base: BaseModel, request: PreviewRequest, group: Sequence[tuple[str, int]], watch: SamplerWatch | None
) -> list[Image.Image]:
    # The watch's context is the inner one, so that it sees answers in float32.
    with base.pipeline() as pipeline, watch.batch(len(group)) if watch else nullcontext(), torch.no_grad():
        result = pipeline(
            prompt=[prompt for prompt, _ in group],
            negative_prompt=[request.negative_prompt] * len(group),
            num_inference_steps=request.num_steps,
            guidance_scale=request.guidance,
            generator=[torch.Generator("cpu").manual_seed(seed) for _, seed in group],
        )
    pictures: list[Image.Image] = result.images
    return pictures
