"""What a configuration, or a family without weights, would need: the figures of `sdlora plan`."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from math import prod
from typing import Any

import psutil
import torch
from torch import nn

from sdlora.config.schema import RunConfig
from sdlora.data.dataset import Dataset
from sdlora.estimate.memory import (
    Change,
    Setting,
    adapter_parameters,
    changes,
    full_training_bytes,
    need,
    preservation_time,
)
from sdlora.estimate.meta_model import latents, num_bytes, shapes_of_base, shapes_of_family
from sdlora.events import saved_as, to_json
from sdlora.lora.quantize import num_weights
from sdlora.models.architectures import Family
from sdlora.models.base import BaseModel
from sdlora.run.arguments import Arguments
from sdlora.run.setup import Loaded, load
from sdlora.training.adapter import make_adapter
from sdlora.training.data import TrainingData, training_data
from sdlora.training.loss import Batch, diffusion_loss
from sdlora.training.model import TrainingModel
from sdlora.training.optimizers import Group
from sdlora.training.schedule import make_schedule

PROBE_STEPS = 2
_SMALL_BASE = 100_000_000


@dataclass(frozen=True)
class Forecast:
    """A plan as `--json` prints it.

    Attributes:
        trainable_parameters: How many numbers are trained.
        base_parameters: How many the adapted networks have themselves.
        peak_bytes: The most memory that is needed at once.
        parts: What it is made of.
        memory_bytes: What there is; None if it is not known.
        fits: Whether it is enough; None if that is not known.
        changes: What to change until it is, each on top of those before.
        steps: Optimizer steps of the run; None without images.
        exposures_per_picture: How often each image is seen.
        seconds: Of all steps, from measured ones; None without weights.
        flops_per_step: Arithmetic of one batch.
        images: How many are trained; None without any.
        buckets: Width and height in pixels to how many images have them.
        cache_bytes: What latents and text states take on the disk; None without images.
        full_training_bytes: Weights, gradients and optimizer of full fine-tuning, without activations.
        largest_layer: The layer with the largest adapter: its numbers, and the adapter's.
    """

    trainable_parameters: int
    base_parameters: int
    peak_bytes: int
    parts: dict[str, int]
    memory_bytes: int | None
    fits: bool | None
    changes: list[Change]
    steps: int | None
    exposures_per_image: int = field(metadata=saved_as("exposures_per_picture"))
    seconds: float | None
    flops_per_step: int
    images: int | None = field(metadata=saved_as("pictures"))
    buckets: dict[str, int]
    cache_bytes: int | None
    full_training_bytes: int
    largest_layer: tuple[int, int]

    def to_json(self) -> dict[str, Any]:
        """All figures by name."""
        document: dict[str, Any] = to_json(self)
        return document


def forecast_family(family: Family, config: RunConfig, memory_bytes: int | None) -> Forecast:
    """A plan from shapes alone; the image's size is the configuration's, or the family's own."""
    shapes = shapes_of_family(family)
    edge = config.data.resolution_px or shapes.resolution_px
    # Cards that train these families have bf16.
    dtype = torch.float32 if config.train.precision == "fp32" else torch.bfloat16
    setting = Setting(config, Arguments(config).adapter.spec, shapes, dtype, (edge, edge))
    return _forecast(setting, memory_bytes, None, None, None)


def forecast_config(config: RunConfig, memory_bytes: int | None) -> Forecast:
    """A plan from a configuration, its images and its base; two steps are measured.

    Raises:
        SdloraError: Anything that is wrong with the settings, the images or the base.
    """
    loaded = load(config)
    setting, cache_bytes = setting_of(config, loaded)
    memory = device_memory(loaded.device) if memory_bytes is None else memory_bytes
    num_batches = sum(map(len, make_schedule(Arguments(config).schedule, loaded.dataset).steps))
    # Images of what is preserved come in as many batches again.
    num_batches *= 1 if loaded.prior is None else 2
    seconds = num_batches * step_seconds(config, loaded, setting)
    if config.data.class_words:
        seconds *= preservation_time(1 / config.train.preservation_every)
    return _forecast(setting, memory, loaded.dataset, cache_bytes, seconds)


def setting_of(config: RunConfig, loaded: Loaded) -> tuple[Setting, int]:
    """What is planned for images and a base that are loaded, and the bytes of their cache on the disk."""
    data = training_data(Arguments(config).captions, loaded.dataset, loaded.cache)
    return _setting(config, loaded.base, data, loaded.device)


def memory_of_run(
    config: RunConfig, base: BaseModel, data: TrainingData, device: torch.device
) -> tuple[int | None, int | None]:
    """The peak that is planned and what the device has free; None for bases so small that they fit anywhere."""
    if num_weights(base.unet) < _SMALL_BASE:
        return None, None
    setting, _ = _setting(config, base, data, device)
    # What is loaded already is no longer free; text encoders that wait elsewhere take nothing of it.
    there = [network for network in base.text_encoders if next(network.parameters()).device.type == device.type]
    loaded = num_bytes(base.unet, *there) + (setting.shapes.vae_bytes if setting.on_cpu else 0)
    return need(setting).peak_bytes, device_memory(device) + loaded


def _setting(config: RunConfig, base: BaseModel, data: TrainingData, device: torch.device) -> tuple[Setting, int]:
    examples, shapes = data.dataset.examples, shapes_of_base(base)
    # In float16, as the cache keeps them.
    per_place = 2 * int(shapes.vae["latent_channels"]) * 2
    moments = sum(per_place * prod(edge // shapes.latent_factor for edge in e.bucket) for e in examples)
    captions = set(data.captions(make_schedule(Arguments(config).schedule, data.dataset).timesteps))
    states = 0 if data.text_is_trained else data.cache.text_bytes(len(captions))
    text_is_live = states > config.cache.max_text_gib * 2**30
    states = 0 if text_is_live else states
    largest = max((example.bucket for example in examples), key=prod)
    # Cached tensors stay in the host's memory, which is the device's own on a CPU.
    on_cpu = device.type == "cpu"
    held = moments + states if on_cpu else 0
    setting = Setting(
        config,
        Arguments(config).adapter.spec,
        shapes,
        base.unet.dtype,
        largest,
        held,
        on_cpu=on_cpu,
        text_is_live=text_is_live,
    )
    return setting, moments + states


def device_memory(device: torch.device) -> int:
    """What the device has free, in bytes."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def step_seconds(config: RunConfig, loaded: Loaded, setting: Setting) -> float:
    """How long a batch takes here without anything preserved: the faster of two, on noise of the largest bucket's size.

    The base keeps its adapter afterwards.
    """
    base, size = loaded.base, config.train.batch_size
    adapter = make_adapter(Arguments(config).adapter, base)
    model = TrainingModel(
        base.unet,
        adapter,
        [Group(adapter.parameters(), 1.0)],
        optimizer="adamw",
        gradient_checkpointing=config.train.gradient_checkpointing,
    )
    optimizer = torch.optim.AdamW(model.parameters())
    clean = torch.zeros_like(latents(setting.shapes, size, setting.bucket), device="cpu")
    found = []
    for _ in range(PROBE_STEPS):
        with torch.set_grad_enabled(adapter.adapts_text):
            text = base.encode_captions([""] * size) | base.image_states(loaded.dataset.examples[:1] * size)
        begin = time.perf_counter()
        batch = Batch(clean, torch.randn_like(clean), torch.full((size,), 500), text)
        with model.forward_backward():
            loss = diffusion_loss(base, batch).mean()
            torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()  # waits for the device
        found.append(time.perf_counter() - begin)
    return min(found)


def _forecast(
    setting: Setting,
    memory_bytes: int | None,
    dataset: Dataset | None,
    cache_bytes: int | None,
    seconds: float | None,
) -> Forecast:
    config, needed = setting.config, need(setting)
    examples = () if dataset is None else dataset.examples
    repeats = max((example.repeats for example in examples), default=config.data.repeats_range[1])
    fits = None if memory_bytes is None else needed.peak_bytes <= memory_bytes
    inputs, outputs, rank, kernel = needed.largest_layer
    return Forecast(
        trainable_parameters=needed.trainable_parameters,
        base_parameters=needed.base_parameters,
        peak_bytes=needed.peak_bytes,
        parts=needed.parts,
        memory_bytes=memory_bytes,
        fits=fits,
        changes=[] if memory_bytes is None else changes(setting, needed, memory_bytes),
        steps=None if dataset is None else len(make_schedule(Arguments(config).schedule, dataset).steps),
        exposures_per_image=repeats * config.train.epochs,
        seconds=seconds,
        flops_per_step=needed.flops,
        images=len(examples) or None,
        buckets={f"{width}x{height}": count for (width, height), count in Counter(e.bucket for e in examples).items()},
        cache_bytes=cache_bytes,
        full_training_bytes=full_training_bytes(needed.base_parameters),
        largest_layer=(inputs * outputs * kernel**2, adapter_parameters(inputs, outputs, rank, kernel)),
    )
