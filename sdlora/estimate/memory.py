"""What a run needs before it is run: how many numbers are trained, how much memory, how many steps.

A step is taken on the meta device by the very code that trains, and its bytes and operations are counted.
Shapes: i in, o out, r rank, k kernel.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import cast

import torch
from diffusers import AutoencoderKL

from sdlora.config.schema import RunConfig
from sdlora.estimate.meta_model import META, MetaBase, Shapes, latents, num_bytes
from sdlora.estimate.trace import Cost, counted
from sdlora.lora.inject import Adapter, AdapterSpec, inject
from sdlora.lora.quantize import Quantization, num_weights
from sdlora.lora.targets import find_targets
from sdlora.lora_files.verify import VERIFY_LATENT_EDGE, VERIFY_TIMESTEPS
from sdlora.models.base import BaseModel
from sdlora.training.loss import Batch, diffusion_loss
from sdlora.training.model import TrainingModel
from sdlora.training.optimizers import Group
from sdlora.training.prior_preservation import diffusion_loss_with_prior

FULL_BYTES_PER_PARAMETER = 16
"""Mixed precision with Adam: weight and gradient in 16 bits, weight, mean and variance in 32 (1910.02054, 3.1)."""

# Bytes of an optimizer's state per trained number; Adafactor keeps rows and columns of a matrix alone.
OPTIMIZER_BYTES = {"adamw": 8, "adamw8bit": 2, "prodigy": 16, "adafactor": 1, "lion": 4, "schedule_free": 8}
_PREVIEW_PIXELS = 8 * 128 * 128
# Kernels' work buffers and a run's own objects, as whole runs were measured to hold (docs/measurements/performance.md).
_OVERHEAD_BYTES = 12 * 2**20
# What a second base's objects hold beside its weights, found the same way.
_SECOND_BASE_BYTES = 6 * 2**20


@dataclass(frozen=True)
class Need:
    """What a step needs.

    Attributes:
        trainable_parameters: How many numbers are trained.
        base_parameters: How many the adapted networks have themselves.
        parts: Bytes at the peak: "weights" of the frozen networks that are there in a step, "adapter" with its
            gradients and its optimizer's state, "activations" of the largest step, "caches" held beside them,
            "overhead" of kernels and the process, and what "previews", encoding or proving a file need beyond the
            activations.
        flops: Of one step's batch, forward and backward.
        largest_layer: Inputs and outputs of the layer with the largest adapter, its rank and its kernel's edge.
    """

    trainable_parameters: int
    base_parameters: int
    parts: dict[str, int]
    flops: int
    largest_layer: tuple[int, int, int, int]

    @property
    def peak_bytes(self) -> int:
        """All parts together."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Setting:
    """What is asked for.

    Attributes:
        config: The run's configuration.
        spec: The adapter's, as the configuration describes it.
        shapes: The base's.
        dtype: The frozen UNet's type.
        bucket: Width and height in pixels of the largest images.
        cached_bytes: What latents and text states hold in the memory that is planned.
        on_cpu: Whether all of a run shares the memory that is planned: VAE and text encoders stay in it, and the base
            is loaded once more to prove every epoch's file. On a device of its own they take turns.
        text_is_live: Whether captions are encoded in every step, too many of them to be kept.
    """

    config: RunConfig
    spec: AdapterSpec
    shapes: Shapes
    dtype: torch.dtype
    bucket: tuple[int, int]
    cached_bytes: int = 0
    on_cpu: bool = False
    text_is_live: bool = False


@dataclass(frozen=True)
class Change:
    """One way to need less memory.

    Attributes:
        change: What to set.
        peak_bytes: The peak with it.
        time: Arithmetic per image over that without the change.
        price: What it costs, in a few words.
    """

    change: str
    peak_bytes: int
    time: float
    price: str


def adapter_parameters(inputs: int, outputs: int, rank: int, kernel: int = 1) -> int:
    """How many numbers A (r, i k k) and B (o, r) have: 65,536 for 4096 x 4096 at rank 8."""
    return rank * (inputs * kernel * kernel + outputs)


def full_training_bytes(base_parameters: int) -> int:
    """What weights, gradients and optimizer of full fine-tuning would hold, without activations."""
    return FULL_BYTES_PER_PARAMETER * base_parameters


def preservation_time(share: float) -> float:
    """Arithmetic of exposures of which a share is compared with the base, over that of the same without any comparison.

    A comparison takes the adapter's prediction forward and backward, as an exposure does, and the base model's forward,
    half as much.
    """
    return 1 + 1.5 * share


def need(setting: Setting) -> Need:
    """Count what a run needs.

    Raises:
        ConfigError: A target matches no layer of the base.
    """
    config, shapes = setting.config, setting.shapes
    text_is_trained = "text_encoder" in config.lora.targets
    quantization = config.base.quantization
    base = MetaBase(shapes, setting.dtype, quantization=quantization, text_is_trained=text_is_trained)
    in_a_step = shapes.text_bytes * (text_is_trained or setting.text_is_live)
    weights = num_bytes(base.unet) + (shapes.frozen_bytes if setting.on_cpu else in_a_step)
    num_parameters = num_weights(base.unet)
    paths = find_targets(base.unet, config.lora.targets, base.text_encoders)
    # Where singular vectors start makes no difference to what is held, and meta tensors have none.
    gaussian = replace(setting.spec, init="gaussian")
    adapter = inject(
        base.unet, paths, config.lora.rank, config.lora.alpha, 0, spec=gaussian, text_encoders=base.text_encoders
    )
    count = adapter.num_parameters()
    lean = TrainingModel(
        base.unet,
        adapter,
        [Group(adapter.parameters(), 1.0)],
        optimizer=config.train.optimizer,
        gradient_checkpointing=config.train.gradient_checkpointing,
    )
    step = _step_cost(setting, base, adapter, lean)
    state = OPTIMIZER_BYTES[config.train.optimizer] + 4 * (config.train.ema_decay > 0)
    start = 4 * (setting.spec.init != "gaussian")
    # The first of several batches finds no gradients yet, and the others find those of the first.
    gradients = 4 * count * (config.train.gradient_accumulation_steps > 1)
    activations = step.peak_bytes + gradients - 4 * count
    beside = max(_preview_bytes(setting, base), _encode_bytes(setting))
    if setting.on_cpu:
        beside = max(beside, 4 * num_parameters + shapes.frozen_bytes + _verification_bytes(setting, base, count))
    else:
        drawing = beside + shapes.vae_bytes + shapes.text_bytes * text_is_trained
        beside = max(drawing, shapes.text_bytes) - in_a_step
    largest = max(adapter.layers.values(), key=lambda layer: layer.down.numel() + layer.up.numel())
    return Need(
        trainable_parameters=count,
        base_parameters=adapter.num_base_parameters(),
        parts={
            "weights": weights,
            "adapter": (8 + state + start) * count,
            "activations": activations,
            "caches": setting.cached_bytes,
            "overhead": _OVERHEAD_BYTES,
            "previews": max(0, beside - activations - 4 * count),
        },
        flops=step.flops,
        largest_layer=(largest.down.shape[1], largest.up.shape[0], largest.rank, (*largest.down.shape, 1, 1)[2]),
    )


def _step_cost(setting: Setting, base: MetaBase, adapter: Adapter, lean: TrainingModel) -> Cost:
    """Forward and backward pass of the largest batch, by the code that trains."""
    config, size = setting.config, setting.config.train.batch_size
    # It is no whole model, but answers as one.
    model = cast(BaseModel, base)
    clean = latents(setting.shapes, size, setting.bucket)
    timesteps = torch.zeros(size, dtype=torch.long, device=META)
    with lean.forward_backward(), counted() as cost:
        batch = Batch(clean, torch.empty_like(clean), timesteps, base.text(size))
        if config.data.class_words:
            most = -(-size // config.train.preservation_every)
            with torch.no_grad():
                kept = base.text(most)
            plain, distance = diffusion_loss_with_prior(
                model, adapter, batch, torch.arange(most, device=META), base.text(most), kept
            )
            objective = torch.cat([plain, distance])
        else:
            objective = diffusion_loss(model, batch)
        torch.autograd.backward(objective.sum())
        del objective
    return cost


def _preview_bytes(setting: Setting, base: MetaBase) -> int:
    """What drawing previews holds beside the weights: the UNet's answers, or the images as they are decoded."""
    config, shapes = setting.config, setting.shapes
    if not config.preview.enabled:
        return 0
    edge = shapes.resolution_px
    number = max(1, _PREVIEW_PIXELS // edge**2)
    noisy = latents(shapes, number, (edge, edge))
    with torch.no_grad(), counted() as drawing:
        twice = noisy.repeat(2, 1, 1, 1)
        base.predict(twice, torch.zeros(2 * number, dtype=torch.long, device=META), base.text(2 * number))
    with torch.no_grad(), counted() as decoding:
        _vae(shapes).decode(noisy)
    return max(drawing.peak_bytes, decoding.peak_bytes)


def _verification_bytes(setting: Setting, base: MetaBase, count: int) -> int:
    """What proving a file holds beside a second base's float32 weights: answers, and the adapter put in and read."""
    edge = VERIFY_LATENT_EDGE * setting.shapes.latent_factor
    number = len(VERIFY_TIMESTEPS)
    with torch.no_grad(), counted() as answering:
        noisy = latents(setting.shapes, number, (edge, edge))
        base.predict(noisy, torch.zeros(number, dtype=torch.long, device=META), base.text(number))
    return answering.peak_bytes * 4 // setting.dtype.itemsize + 3 * 4 * count + _SECOND_BASE_BYTES


def _encode_bytes(setting: Setting) -> int:
    """What turning one image into latents holds beside the weights."""
    width, height = setting.bucket
    with torch.no_grad(), counted() as cost:
        pixels = torch.empty(1, 3, height, width, device=META)
        _vae(setting.shapes).encode(pixels)
    return cost.peak_bytes


def _vae(shapes: Shapes) -> AutoencoderKL:
    with META:
        return AutoencoderKL.from_config(dict(shapes.vae)).eval()


def changes(setting: Setting, needed: Need, memory_bytes: int) -> list[Change]:
    """What to change until a run fits, what costs least first; each comes on top of those before it.

    Args:
        setting: What was asked for.
        needed: What it needs.
        memory_bytes: What there is.

    Returns:
        Nothing if it fits as it is; otherwise as few as are enough, or all there are.
    """
    found: list[Change] = []
    first, peak = _flops_per_image(setting, needed), needed.peak_bytes
    for change, price, changed in _cheaper(setting):
        if peak <= memory_bytes:
            break
        less = need(changed)
        if less.peak_bytes < peak:
            peak = less.peak_bytes
            found.append(Change(change, peak, _flops_per_image(changed, less) / first, price))
    return found


def _flops_per_image(setting: Setting, needed: Need) -> float:
    return needed.flops / setting.config.train.batch_size


def _cheaper(setting: Setting) -> Iterator[tuple[str, str, Setting]]:
    """What to set, its price in words, and everything as it then is."""
    train = setting.config.train
    if setting.dtype == torch.float32:
        setting = replace(setting, dtype=torch.bfloat16)
        yield "train.precision = 'bf16'", "as good; faster where the device has it", setting
    if train.batch_size > 1:
        steps = train.gradient_accumulation_steps * train.batch_size
        setting = _with_train(setting, batch_size=1, gradient_accumulation_steps=steps)
        told = f"train.batch_size = 1 and train.gradient_accumulation_steps = {steps}"
        yield told, "the same training in more passes, which keeps a fast GPU less busy", setting
    if setting.config.base.quantization == "none":
        # The schema does not take both.
        told = "train.compile = false and " if train.compile else ""
        setting = _with_train(_quantized(setting, "int8"), compile=False)
        yield f"{told}base.quantization = 'int8'", "the base's weights rounded by about a hundredth", setting
    if not train.gradient_checkpointing:
        setting = _with_train(setting, gradient_checkpointing=True)
        yield "train.gradient_checkpointing = true", "the same training, computed partly twice", setting
    if setting.config.preview.enabled:
        unseen = setting.config.preview.model_copy(update={"enabled": False})
        setting = replace(setting, config=setting.config.model_copy(update={"preview": unseen}))
        yield "preview.enabled = false", "the same training, unseen: no previews and no copy check", setting
    if setting.config.base.quantization == "int8":
        setting = _quantized(setting, "nf4")
        yield "base.quantization = 'nf4'", "the base's weights rounded by about a tenth", setting
    for share in (3 / 4, 1 / 2):
        step = setting.config.data.bucket_step_px
        width, height = (max(step, round(edge * share / step) * step) for edge in setting.bucket)
        smaller = replace(setting, bucket=(width, height))
        yield f"data.resolution_px = {min(width, height)}", "images are trained smaller", smaller


def _quantized(setting: Setting, kind: Quantization) -> Setting:
    config = setting.config
    return replace(
        setting, config=config.model_copy(update={"base": config.base.model_copy(update={"quantization": kind})})
    )


def _with_train(setting: Setting, **values: object) -> Setting:
    config = setting.config
    return replace(setting, config=config.model_copy(update={"train": config.train.model_copy(update=values)}))
