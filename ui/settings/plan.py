"""What a recipe comes to, in words, before anything is started.

Counts are had at once; time and memory come from `sdlora plan`, which measures a step of the real thing.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdlora.common.text import format_range, format_seconds
from sdlora.config.schema import RunConfig
from sdlora.config.toml import dump_toml
from sdlora.run.arguments import Arguments
from sdlora.run.datasets import read_images
from sdlora.training.schedule import make_schedule

from ..state.folders import StudioError
from .base_models import shapes_of
from .draft import Draft

_USUAL_PX = 512
_TIMEOUT_SECONDS = 600


@dataclass(frozen=True)
class Counts:
    """What is trained, in numbers.

    Attributes:
        images: How many are trained on.
        heldout: How many are kept out, to judge by.
        exposures: How often each image is seen in all.
        steps: Optimizer steps of the whole run.
        resolution_px: The training size, as the edge of a square.
    """

    images: int
    validation: int
    exposures: int
    steps: int
    resolution_px: int


def count(config: RunConfig) -> Counts:
    """Count what a configuration does, without loading its base.

    Raises:
        SdloraError: The images cannot be trained on.
    """
    data = config.data
    images = read_images(config)
    split_off = images.validation if data.validation_folder is None else None
    validation = len(split_off.examples) if split_off else 0
    resolution_px = data.resolution_px or base_resolution_px(config.base.path)
    dataset = images.trained.with_buckets(resolution_px, data.bucket_step_px, buckets=data.buckets)
    steps = len(make_schedule(Arguments(config).schedule, dataset).steps)
    exposures = max(example.repeats for example in dataset.examples) * config.train.epochs
    return Counts(len(dataset.examples), validation, exposures, steps, resolution_px)


def base_resolution_px(path: str) -> int:
    """The size that a base was trained at, by its files; 512 for one that is not on this machine."""
    shapes = shapes_of(path)
    return _USUAL_PX if shapes is None else shapes.resolution_px


def in_words(config: RunConfig, counts: Counts) -> list[str]:
    """The plan as sentences."""
    train, repeats = config.train, config.data.repeats_range
    exposures = format_range(*(train.epochs * each for each in repeats))
    told = [
        f"{counts.images} images at {counts.resolution_px} px, each seen {exposures} times: "
        f"{format_range(*repeats)} times in each of {train.epochs} epochs.",
        f"That is {counts.steps:,} steps of {train.batch_size * train.gradient_accumulation_steps} "
        f"{'picture' if train.batch_size * train.gradient_accumulation_steps == 1 else 'pictures'}.",
    ]
    if counts.validation:
        told.append(f"{counts.validation} images are kept out of training; the epochs are judged by them.")
    elif config.data.validation_folder is None:
        told.append("No image is held out, so that the last epoch is kept: with 20 images or more, the best one is.")
    if config.copycheck.enabled and config.preview.enabled:
        told.append("After every epoch, previews are drawn and compared with all of your images.")
    return told


def memory_in_words(draft: Draft) -> list[str]:
    """What a recipe needs of this machine's memory, and what was changed for it."""
    found = draft.needs()
    if found is None:
        return ["Its base is not on this machine, so that what it needs of the memory is told when it has come."]
    told = f"It needs {_gb(found.peak_bytes)} of memory at its peak; {_gb(found.memory_bytes)} can be used."
    changed = (
        [f"Set so that it fits into this machine's memory: {', then '.join(draft.fitted)}."] if draft.fitted else []
    )
    if found.peak_bytes <= found.memory_bytes:
        return [*changed, f"{told} It fits."]
    if found.fitted_bytes <= found.memory_bytes:
        return [*changed, f"{told} It does not fit. Under More, set {', then '.join(found.told)}."]
    return [*changed, f"{told} No setting makes it fit: choose a smaller base, or a machine with more memory."]


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GB"


def measure(config: RunConfig) -> dict[str, Any]:
    """What `sdlora plan` says of a configuration.

    Raises:
        StudioError: It refuses the configuration, or fails.
    """
    return dict(_measure(dump_toml(config)))


@functools.lru_cache(maxsize=32)
def _measure(toml: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "plan.toml"
        file.write_text(toml, encoding="utf-8")
        command = [sys.executable, "-m", "sdlora", "plan", str(file), "--json"]
        try:
            result = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired as error:
            raise StudioError(
                "Measuring took longer than ten minutes and was given up. You can start anyway."
            ) from error
    if result.returncode != 0:
        raise StudioError(result.stderr.strip().removeprefix("Error: ") or "The plan could not be measured.")
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def measured_in_words(plan: dict[str, Any]) -> list[str]:
    """Time and memory as sentences."""
    told = []
    if (seconds := plan.get("seconds")) is not None:
        told.append(f"It takes about {format_seconds(float(seconds))}, by a step that was measured.")
    if (peak := plan.get("peak_bytes")) is not None:
        fits = "which fits" if plan.get("fits", True) else "which does not fit: lower the batch size or the resolution"
        told.append(f"At its peak it needs {float(peak) / 2**30:.1f} GB of memory, {fits}.")
    return told
