"""Bytes that a run writes: into the cache and into its own folder.

Known before the run writes anything; `sdlora plan` prints the cache's, and a run checks both against its disks.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path

from sdlora.cache.tensors import Cache
from sdlora.common.text import format_bytes
from sdlora.config.schema import RunConfig
from sdlora.data.batches import Exposure
from sdlora.data.dataset import Example
from sdlora.errors import DiskFullError
from sdlora.estimate.memory import OPTIMIZER_BYTES
from sdlora.estimate.meta_model import shapes_of_base
from sdlora.lora.inject import Adapter
from sdlora.training.checkpoint import KEPT
from sdlora.training.data import TrainingData

_MARGIN_BYTES = 2_000_000  # for small files


def cached_content(used: Iterable[tuple[TrainingData, Iterable[Exposure] | None]]) -> tuple[list[Example], list[str]]:
    """Every image and every caption that is encoded, each once.

    Data sets come with the exposures that ask for them; None stands for the first exposure of every image.
    """
    examples: dict[Example, None] = {}
    captions: dict[str, None] = {}
    for data, planned in used:
        exposures = [Exposure(i, 1) for i in range(len(data.dataset.examples))] if planned is None else list(planned)
        examples |= dict.fromkeys(data.seen(exposures))
        captions |= dict.fromkeys(data.captions(exposures))
    return list(examples), list(captions)


def cache_bytes(cache: Cache, examples: Iterable[Example], num_captions: int) -> int:
    """Latents of images with their buckets and text embeddings in the cache, in float16 as it keeps them.

    Args:
        num_captions: Different captions that are kept; 0 if captions are encoded at every exposure.
    """
    shapes = shapes_of_base(cache.base)
    # Mean and log-variance of every latent, in two bytes each.
    per_latent = 2 * 2 * int(shapes.vae["latent_channels"])
    latents = sum(prod(edge // shapes.latent_factor for edge in example.bucket) for example in examples)
    return per_latent * latents + (cache.text_bytes(num_captions) if num_captions else 0)


def image_bytes(num_images: int, num_pixels: int) -> int:
    """Images of so many pixels as PNG files, at most."""
    return num_images * 3 * num_pixels


def run_folder_bytes(config: RunConfig, adapter: Adapter, num_previews: int, preview_pixels: int) -> int:
    """What a run's folder holds at most, with `num_previews` images drawn after every epoch."""
    count = adapter.num_parameters()
    start = 4 * sum(tensor.numel() for tensor in adapter.initial_factors())
    per_parameter = 4 + OPTIMIZER_BYTES[config.train.optimizer] + 4 * (config.train.ema_decay > 0)
    # A new checkpoint, LoRA file or page is written before an old one is deleted.
    checkpoints = (KEPT + 1) * (per_parameter * count + start)
    lora_files = (config.train.epochs + 2) * (4 * count + start)
    # Every image as it is, twice on the contact sheet, and, as text on the page, which is replaced, thrice more.
    images = 6 * image_bytes(num_previews * (config.train.epochs + 1), preview_pixels)
    return checkpoints + lora_files + images


def check_disk_space(needs: Mapping[str, tuple[Path, int]]) -> None:
    """Check that what is going to be written, in words, fits in bytes onto the disk of its folder.

    Raises:
        DiskFullError: A disk is too small; the message names it, its free space and the bytes that are needed.
    """
    disks: dict[int, list[tuple[str, Path, int]]] = {}
    for name, (folder, num_bytes) in needs.items():
        existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        disks.setdefault(existing.stat().st_dev, []).append((name, existing, num_bytes))
    for written in disks.values():
        free = shutil.disk_usage(written[0][1]).free
        needed = sum(num_bytes for *_, num_bytes in written) + _MARGIN_BYTES
        if free < needed:
            raise DiskFullError(
                f"{' and '.join(name for name, *_ in written)} need up to {format_bytes(needed)}, and the disk of "
                f"{written[0][1]} has {format_bytes(free)} left. Free some space, or choose another --output or "
                "cache.dir."
            )


def bytes_in(folder: Path) -> int:
    """What the files in a folder take; 0 where there is none."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
