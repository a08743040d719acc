"""What a recipe needs, before anything is loaded: memory, images, steps and time, in words.

Only headers and configurations of files are read; memory is estimated as by `sdlora plan`, which also times a step.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sdlora.common.text import format_bytes, format_range, format_seconds
from sdlora.config.exposures import exposures_warning
from sdlora.config.schema import RunConfig
from sdlora.config.toml import dump_toml, parse_config
from sdlora.estimate.meta_model import Shapes
from sdlora.run.arguments import read_images
from sdlora.run.estimate import Estimate, count_steps, device_memory, estimate_shapes
from sdlora.run.lora_inputs import with_settings_of_file

from ..state.decoded import cached_decode
from ..state.folders import StudioError
from ..state.subprocesses import device_name
from .bases import base_resolution_px, shapes_of

_TIMEOUT_SECONDS = 600
_USABLE = 0.9  # of a GPU: the rest is its driver's and the screen's
_HIGHEST_RATE, _LOWEST_RATE = 0.01, 1e-6  # the built-in base model learns at 0.003
_OF_MEMORY = ("base", "lora", "train", "preview")
# Of those sections, what memory does not depend on: a change of it is no reason to count anew.
_UNCOUNTED = {
    "base.family", "lora.alpha", "lora.dropout", "train.epochs", "train.exposures", "train.learning_rate",
    "train.text_encoder_learning_rate", "train.loraplus_lr_ratio", "train.lr_schedule", "train.warmup_steps",
    "train.weight_decay", "train.max_grad_norm", "train.log_every_steps", "train.checkpoint_every_steps",
    "train.trackers", "preview.prompts", "preview.num_captions", "preview.seeds", "preview.negative_prompt",
    "preview.num_steps", "preview.sampler", "preview.every_steps",
}  # fmt: skip
_OF_IMAGES = (
    "resolution_px",
    "resolutions_px",
    "class_words",
    "preservation_folder",
    "masks",
)  # what those sections go with


def estimate(config: RunConfig) -> Estimate | None:
    """What a recipe needs on this machine, and what to set if it does not fit; None if its base model is not here."""
    config = with_settings_of_file(config)
    shapes = shapes_of(config.base.path)
    if shapes is None:
        return None
    device = device_name(config.train.device)
    memory_bytes = usable_memory(device)
    document = tomllib.loads(dump_toml(config))
    kept = {
        section: {name: value for name, value in document[section].items() if f"{section}.{name}" not in _UNCOUNTED}
        for section in _OF_MEMORY
        if section in document
    }
    if config.train.optimizer == "prodigy":
        kept["train"]["learning_rate"] = config.train.learning_rate
    # Of prompts, only those with a size of their own.
    sizes = [{key: one[key] for key in ("width_px", "height_px") if key in one} for one in _tables(config)]
    kept["preview"]["prompts"] = [{"text": "a prompt", **size} for size in sizes if size]
    # The trigger takes no memory, but class words need one.
    data = {name: document["data"][name] for name in _OF_IMAGES if name in document["data"]}
    data |= {"folder": "none", "trigger": "trigger"}
    key = json.dumps(kept | {"data": data}), json.dumps(vars(shapes)), device == "cpu"
    # Free memory changes from second to second, so what a recipe needs is counted, and kept, without it.
    needed = _estimated(*key, None)
    if needed.peak_bytes <= memory_bytes:
        return replace(needed, memory_bytes=memory_bytes)
    # Down to a multiple of 256 MiB, so that the last hints can be used again.
    return replace(_estimated(*key, memory_bytes >> 28 << 28), memory_bytes=memory_bytes)


def _tables(config: RunConfig) -> list[dict[str, Any]]:
    """The prompts of previews that have settings of their own."""
    return [prompt.model_dump() for prompt in config.preview.prompts if not isinstance(prompt, str)]


def usable_memory(device: str) -> int:
    """The bytes that a run may use: what is free, or on a GPU, which runs have to themselves, nearly all of it."""
    if device.startswith("cuda") and torch.cuda.is_available():
        return int(_USABLE * torch.cuda.get_device_properties(device).total_memory)
    return device_memory(torch.device("cpu"))


@functools.lru_cache(maxsize=64)
def _estimated(document: str, shapes: str, on_cpu: bool, memory_bytes: int | None) -> Estimate:
    config = parse_config(json.loads(document), name="plan")
    return estimate_shapes(config, Shapes(**json.loads(shapes)), memory_bytes, on_cpu=on_cpu)


# --- In words ---------------------------------------------------------------------------------------------------------


def describe_run(config: RunConfig) -> list[str]:
    """Images and steps of a configuration as sentences; its base model is not loaded.

    Raises:
        SdloraError: The images cannot be trained on.
    """
    data, train, repeats = config.data, config.train, config.data.repeats_range
    images = read_images(data, config.seed, cached_decode)
    resolution_px = data.resolution_px or base_resolution_px(config.base.path)
    dataset = images.training.with_buckets(resolution_px, data.bucket_options)
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


def warnings(config: RunConfig) -> list[str]:
    """What is unusual about a configuration's length and learning rates, and what to set instead, as sentences."""
    train, (fewest, most) = config.train, config.data.repeats_range
    told = exposures_warning(fewest * train.epochs, most * train.epochs)
    found = [] if told is None else [told]
    rates = {name: getattr(train, name) for name in ("learning_rate", "text_encoder_learning_rate")}
    for name, rate in rates.items():
        usual = f"With train.{name} at {rate or 0:g}, {{}}: 0.0001 to 0.001 are usual."
        if rate is not None and rate > _HIGHEST_RATE and train.optimizer != "prodigy":
            found.append(usual.format("the LoRA learns noise"))
        if rate is not None and rate < _LOWEST_RATE:
            found.append(usual.format("hardly anything is learned"))
    return found


def describe_memory(found: Estimate | None, fitted: Sequence[str]) -> list[str]:
    """What a recipe needs of this machine's memory, and what was changed for it."""
    if found is None:
        return ["Its base model is not on this machine; its memory can be estimated once it is downloaded."]
    told = f"It needs {format_bytes(found.peak_bytes)} of memory; {format_bytes(found.memory_bytes or 0)} can be used."
    changed = [f"Changed to fit into this machine's memory: {', then '.join(fitted)}."] if fitted else []
    if found.fits:
        return [*changed, f"{told} It fits."]
    if found.can_fit:
        return [*changed, f"{told} It does not fit. Under More, set {', then '.join(map(str, found.changes))}."]
    return [*changed, f"{told} No setting makes it fit: choose a smaller base model, or a machine with more memory."]


@functools.lru_cache(maxsize=32)
def measure(toml: str) -> Mapping[str, Any]:
    """What `sdlora plan` says of a configuration.

    Raises:
        StudioError: It refuses the configuration, or fails.
    """
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


def describe_measured(found: Mapping[str, Any]) -> list[str]:
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
