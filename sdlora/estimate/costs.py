"""Bytes that a run writes, into the cache and into its own folder, and how long its training step takes.

Used by `sdlora plan`, by a batch's dry run, and by a run before it starts: its disks are checked against the bytes, and
the largest step is computed up to its gradients, which are discarded.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable, Mapping
from itertools import chain
from math import prod
from pathlib import Path
from statistics import median

import torch

from sdlora.cache.tensors import Cache
from sdlora.common.text import format_bytes
from sdlora.config.schema import RunConfig
from sdlora.data.batches import Exposure
from sdlora.data.dataset import Example
from sdlora.errors import DiskFullError
from sdlora.estimate.memory import optimizer_bytes
from sdlora.estimate.meta_model import shapes_of_base
from sdlora.lora.inject import Adapter
from sdlora.training.checkpoint import KEPT
from sdlora.training.data import TrainingData
from sdlora.training.prior_preservation import ClassWords
from sdlora.training.trainer import Trainer

_MARGIN_BYTES = 2_000_000  # for small files
_REPEATS = 3  # the first one warms up, and the median leaves it out


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
    per_latent = 2 * 2 * shapes.latent_channels
    latents = sum(prod(edge // shapes.latent_factor for edge in example.bucket) for example in examples)
    return per_latent * latents + (cache.text_bytes(num_captions) if num_captions else 0)


def image_bytes(num_images: int, num_pixels: int) -> int:
    """Images of so many pixels as PNG files, at most."""
    return num_images * 3 * num_pixels


def run_folder_bytes(
    config: RunConfig, adapter: Adapter, num_previews: int, preview_pixels: int, rounds: int = 0
) -> int:
    """What a run's folder holds at most, with `num_previews` images drawn after every epoch and in further rounds."""
    count = adapter.num_parameters()
    start = 4 * sum(tensor.numel() for tensor in adapter.initial_factors())
    per_parameter = 4 + optimizer_bytes(config.train.optimizer) + 4 * (config.train.ema_decay > 0)
    # A new checkpoint, LoRA file or page is written before an old one is deleted.
    checkpoints = (KEPT + 1) * (per_parameter * count + start)
    lora_files = (config.train.epochs + 2) * (4 * count + start)
    # Every image as it is, twice on the contact sheet, and, as text on the page, which is replaced, thrice more.
    images = 6 * image_bytes(num_previews * (config.train.epochs + 1), preview_pixels)
    images += 2 * image_bytes(num_previews * rounds, preview_pixels)
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
                f"{' and '.join(name for name, *_ in written)} can take up to {format_bytes(needed)}, and the disk of "
                f"{written[0][1]} has {format_bytes(free)} left. Free some space, or choose another --output or "
                "cache.dir."
            )


def bytes_in(folder: Path) -> int:
    """What the files in a folder take; 0 where there is none."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def step_seconds(trainer: Trainer, background: str) -> float:
    """Seconds of an average step, from the one with the largest batch, without the optimizer's own arithmetic.

    The trainer is left as it was, but for the step's images and captions in the cache.
    """
    number = _largest_step(trainer)
    for term in trainer.terms:
        for _ in term.loss.data.fill(background, chain.from_iterable(term.schedule.steps[number - 1])):
            pass
    seconds = []
    for _ in range(_REPEATS):
        begin = time.monotonic()
        losses = trainer.step.gradients(number, trainer.position.micro_batch_size)
        if losses is not None:
            losses.sum().item()  # waits for the device
        trainer.step.optimizer.zero_grad(set_to_none=True)
        seconds.append(time.monotonic() - begin)
    words, exposures = trainer.terms[0].loss.extra, list(chain.from_iterable(trainer.schedule.steps[number - 1]))
    if not isinstance(words, ClassWords):
        return median(seconds)
    here, average = len(words.compared.intersection(exposures)), len(words.compared) / len(trainer.schedule.timesteps)
    return median(seconds) * comparison_cost(average) / comparison_cost(here / len(exposures))


def arithmetic_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP per second of large matrix products on a device, the fastest that any step can go."""
    edge = 4096 if device.type == "cuda" else 1024
    one, other = (torch.randn(edge, edge, device=device, dtype=dtype) for _ in range(2))
    fastest = float("inf")
    for _ in range(5):
        begin = time.monotonic()
        (one @ other).sum().item()  # waits for the device
        fastest = min(fastest, time.monotonic() - begin)
    return 2 * edge**3 / fastest


def comparison_cost(share: float) -> float:
    """Arithmetic of exposures of which a share is compared with the base model, over that without any comparison.

    A comparison takes the adapter's prediction forward and backward, as an exposure does, and the base model's forward,
    half as much; the share is in [0, 1].
    """
    return 1 + 1.5 * share


def _largest_step(trainer: Trainer) -> int:
    """The number, from 1, of the step whose largest batch has most pixels, then most comparisons with the base."""
    examples, words = trainer.data.dataset.examples, trainer.terms[0].loss.extra
    compared = words.compared if isinstance(words, ClassWords) else frozenset()

    def size(number: int) -> tuple[int, int]:
        batches = trainer.schedule.steps[number - 1]
        pixels = max(sum(prod(examples[e.example].at_exposure(e.number).bucket) for e in batch) for batch in batches)
        return pixels, len(compared.intersection(chain.from_iterable(batches)))

    return max(range(1, trainer.total_steps + 1), key=size)
