"""What a recipe needs, in words, before anything starts.

Images and steps are counted at once, and so is memory; time comes from `sdlora plan`, which times a step.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from sdlora.common.text import format_bytes, format_range, format_seconds
from sdlora.config.schema import RunConfig
from sdlora.config.toml import dump_toml
from sdlora.run.datasets import read_images
from sdlora.run.estimate import count_steps

from ..state.folders import StudioError
from .base_models import shapes_of
from .draft import Draft

_USUAL_PX = 512
_TIMEOUT_SECONDS = 600


def describe_run(config: RunConfig) -> list[str]:
    """Images and steps of a configuration as sentences; its base model is not loaded.

    Raises:
        SdloraError: The images cannot be trained on.
    """
    data, train, repeats = config.data, config.train, config.data.repeats_range
    images = read_images(data, config.seed)
    resolution_px = data.resolution_px or base_resolution_px(config.base.path)
    dataset = images.training.with_buckets(resolution_px, data.bucket_step_px, buckets=data.buckets)
    steps = count_steps(config, dataset)
    seen, per_epoch = format_range(*(train.epochs * each for each in repeats)), format_range(*repeats)
    per_step = train.batch_size * train.gradient_accumulation_steps
    told = [
        f"{len(dataset.examples)} images at {resolution_px} px, each seen {seen} times: {per_epoch} times in each of "
        f"{train.epochs} epochs.",
        f"That is {steps:,} steps of {per_step} image{'' if per_step == 1 else 's'}.",
    ]
    if data.validation_folder is None and images.validation is not None:
        split_off = len(images.validation.examples)
        told.append(f"{split_off} images are kept out of training; the epochs are judged by them.")
    elif data.validation_folder is None:
        told.append("No image is kept out for validation, so the last epoch is kept; from 20 images on, the best one.")
    if config.copycheck.enabled and config.preview.enabled:
        told.append("After every epoch, previews are drawn and compared with all of your images.")
    return told


def base_resolution_px(path: str) -> int:
    """The size that a base model was trained at, by its files; 512 for one that is not on this machine."""
    shapes = shapes_of(path)
    return _USUAL_PX if shapes is None else shapes.resolution_px


def describe_memory(draft: Draft) -> list[str]:
    """What a recipe needs of this machine's memory, and what was changed for it."""
    found = draft.needs()
    if found is None:
        return ["Its base model is not on this machine; its memory can be estimated once it is downloaded."]
    told = f"It needs {format_bytes(found.peak_bytes)} of memory; {format_bytes(found.memory_bytes or 0)} can be used."
    changed = [f"Changed to fit into this machine's memory: {', then '.join(draft.fitted)}."] if draft.fitted else []
    if found.fits:
        return [*changed, f"{told} It fits."]
    if found.can_fit:
        return [*changed, f"{told} It does not fit. Under More, set {', then '.join(map(str, found.changes))}."]
    return [*changed, f"{told} No setting makes it fit: choose a smaller base model, or a machine with more memory."]


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
            raise StudioError("Measuring was stopped after ten minutes. You can start the run anyway.") from error
    if result.returncode != 0:
        raise StudioError(result.stderr.strip().removeprefix("Error: ") or "The run could not be measured.")
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def describe_measured(found: dict[str, Any]) -> list[str]:
    """Time and memory as sentences."""
    told = []
    if (seconds := found.get("seconds")) is not None:
        told.append(f"It takes about {format_seconds(float(seconds))}, going by a step that was timed.")
    if (peak := found.get("peak_bytes")) is not None:
        told.append(f"It needs {format_bytes(float(peak))} of memory at its peak.")
        lower = " and ".join(change["change"] for change in found.get("changes", []))
        if not found.get("fits", True):
            told.append(f"It does not fit. {f'Set {lower}.' if lower else 'Choose a smaller base model.'}")
    return told
