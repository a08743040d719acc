"""Images by the hundred from a diffusers pipeline, and how sure a share of them is.

Used by the benchmarks; nothing of sdlora's own sampling is in between.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from sdlora.previews.sampler import contact_sheet

BATCH = 25
GUIDANCE = 2.0  # what the quickstart draws its previews with


def load_pipeline(base: Path) -> Any:
    """A base as any diffusers user loads it."""
    pipeline = DiffusionPipeline.from_pretrained(base, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(
    pipeline: Any, prompts: Sequence[str], *, guidance: float, steps: int = 25, seed: int = 0
) -> list[Image.Image]:
    """An image per prompt, of the base's own size, each from a seed of its own."""
    edge_px = pipeline.vae.config.sample_size
    images: list[Image.Image] = []
    for first in range(0, len(prompts), BATCH):
        group = list(prompts[first : first + BATCH])
        generators = [torch.Generator().manual_seed(seed + first + i) for i in range(len(group))]
        images += pipeline(
            group, height=edge_px, width=edge_px, num_inference_steps=steps, guidance_scale=guidance,
            generator=generators,
        ).images  # fmt: skip
    return images


def wilson(share: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a share of `count` trials (Wilson 1927)."""
    z = 1.959964
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    reach = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return round(max(0.0, middle - reach), 4), round(min(1.0, middle + reach), 4)


def save_sheet(pipeline: Any, prompts: Sequence[str], target: Path, *, guidance: float, columns: int = 5) -> None:
    """A row per prompt, each drawn from several seeds."""
    rows = [draw(pipeline, [prompt] * columns, guidance=guidance, seed=1000) for prompt in prompts]
    with tempfile.TemporaryDirectory() as folder:
        files = [[Path(folder) / f"{r}_{c}.png" for r in range(len(rows))] for c in range(columns)]
        for r, images in enumerate(rows):
            for c, image in enumerate(images):
                image.save(files[c][r])
        contact_sheet(prompts, [(f"seed {1000 + c}", files[c]) for c in range(columns)], target)
