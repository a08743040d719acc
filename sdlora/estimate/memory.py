"""Memory and arithmetic that a training run needs, counted before it runs.

The code that trains takes a step on the meta device, where tensors have shapes and no values, and its bytes and
operations are counted. Read by `sdlora plan`, by the studio, and by a run before it starts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from typing import cast

import torch
from torch import Tensor

from sdlora.config.schema import RunConfig
from sdlora.estimate.meta_model import META, Cost, MetaBase, Shapes, counted, empty_codes, empty_latents, num_bytes
from sdlora.lora.block_offload import visiting_bytes
from sdlora.lora.inject import Adapter, AdapterSpec, find_targets, inject
from sdlora.lora.quantize import num_weights
from sdlora.lora_files.pipelines import attach
from sdlora.lora_files.read import LoraFile
from sdlora.models.base import BaseModel, proof_dtype
from sdlora.models.unet import PROBE_EDGE, PROBED_TIMESTEPS
from sdlora.training.loss import Batch, diffusion_loss
from sdlora.training.model import TrainingModel
from sdlora.training.optimizers import Group
from sdlora.training.prior_preservation import diffusion_loss_with_prior

# Bytes of an optimizer's state per trained parameter; Adafactor keeps only a matrix's rows and columns.
OPTIMIZER_BYTES = {"adamw": 8, "adamw8bit": 2, "prodigy": 16, "adafactor": 1, "lion": 4, "schedule_free": 8, "muon": 4}
_PREVIEW_PIXELS = 8 * 128 * 128
# Work buffers of kernels and a run's own objects, as measured in whole runs (docs/measurements/performance.md).
_OVERHEAD_BYTES = 12 * 2**20
# What a second base model's objects hold beside its weights, measured the same way.
_SECOND_BASE_BYTES = 6 * 2**20


def optimizer_bytes(optimizer: str) -> int:
    """Bytes of an optimizer's state per trained parameter; of an unknown one as much as AdamW's."""
    return OPTIMIZER_BYTES.get(optimizer, OPTIMIZER_BYTES["adamw"])


@dataclass(frozen=True)
class MemoryInputs:
    """What a memory estimate depends on.

    Attributes:
        spec: The adapter's kind.
        dtype: The frozen UNet's type.
        size_px: Width and height in pixels of the largest images.
        cached_bytes: Latents and text embeddings that are held in the memory that is estimated.
        on_cpu: Whether the whole run shares this memory: VAE and text encoders stay in it, and the base model is loaded
            a second time to verify every epoch's file. On a device of its own they take turns.
        text_is_live: Whether captions are encoded in every step, because they are too many to keep.
        file: The LoRA file that training continues from, or None.
    """

    config: RunConfig
    spec: AdapterSpec
    shapes: Shapes
    dtype: torch.dtype
    size_px: tuple[int, int]
    cached_bytes: int = 0
    on_cpu: bool = False
    text_is_live: bool = False
    file: LoraFile | None = None


@dataclass(frozen=True)
class MemoryEstimate:
    """What a run needs.

    Attributes:
        trainable_parameters: Of the adapter.
        layers: How many get one, by kind.
        base_parameters: Of the networks that are adapted.
        parts: Bytes at the peak: "weights" of the frozen networks that a step needs, "adapter" with gradients and
            optimizer state, "activations" of the largest step, "caches" held beside them, "overhead" of kernels and
            the process, and what "previews", encoding or verifying a file need beyond the activations.
        flops_per_step: Arithmetic of one batch, forward and backward.
        flops_per_prediction: Of a prediction of the UNet for one preview.
        flops_per_decoding: Of decoding one preview.
        largest_layer: Parameters of the layer with the largest adapter, and of that adapter.
        transferred_bytes: Of weights that cross to the device in a step under base.offload, at most.
    """

    trainable_parameters: int
    layers: dict[str, int]
    base_parameters: int
    parts: dict[str, int]
    flops_per_step: int
    flops_per_prediction: int
    flops_per_decoding: int
    largest_layer: tuple[int, int]
    transferred_bytes: int = 0

    @property
    def peak_bytes(self) -> int:
        """All parts together."""
        return sum(self.parts.values())

    @property
    def full_training_bytes(self) -> int:
        """Full fine-tuning in mixed precision with Adam, without activations, for comparison.

        Weight and gradient in 16 bits; weight, mean and variance in 32. Source: Rajbhandari et al. 1910.02054, 3.1.
        """
        return 16 * self.base_parameters


def estimate_memory(inputs: MemoryInputs) -> MemoryEstimate:
    """Count the memory and arithmetic of a run.

    Raises:
        ConfigError: A target matches no layer of the base.
        DataError: The LoRA file does not fit the base.
    """
    config, shapes = inputs.config, inputs.shapes
    text_is_trained = config.lora.trains_text
    quantization = config.base.quantization
    base = MetaBase(shapes, inputs.dtype, quantization=quantization, text_is_trained=text_is_trained)
    beside_text = not base.model.network_waits and (text_is_trained or inputs.text_is_live)
    offloads, lists = config.base.offload == "blocks", shapes.model.block_lists
    block_bytes, visiting = visiting_bytes(base.network, lists) if offloads else (0, 0)
    text_bytes = shapes.offloaded_text_bytes if offloads else shapes.text_bytes
    in_a_step = text_bytes * beside_text
    weights = num_bytes(base.network) + (shapes.frozen_bytes if inputs.on_cpu else in_a_step)
    # On a CPU the host is the device, so that visitors are there twice.
    weights += visiting if inputs.on_cpu else visiting - block_bytes
    if inputs.on_cpu and config.preview.enabled and config.preview_base is not None:
        weights += num_bytes(base.network)  # the sibling waits in this memory as well
    num_parameters = num_weights(base.network)
    if inputs.file is not None:
        adapter = attach(base.network, inputs.file, text_encoders=base.text_encoders)
    else:
        adapter = inject(
            base.network,
            find_targets(base.network, config.lora.targets, base.text_encoders),
            config.lora.rank,
            config.lora.alpha,
            0,
            # Meta tensors have no singular vectors, and all starts take as much.
            spec=replace(inputs.spec, init="gaussian"),
            text_encoders=base.text_encoders,
        )
    count = adapter.num_parameters()
    model = TrainingModel(
        base.network,
        adapter,
        [Group(adapter.parameters(), 1.0)],
        optimizer=config.train.optimizer,
        gradient_checkpointing=config.train.gradient_checkpointing,
    )
    step = _step_cost(inputs, base, adapter, model)
    state = optimizer_bytes(config.train.optimizer) + 4 * (config.train.ema_decay > 0)
    start = 4 * (inputs.spec.init != "gaussian" or bool(adapter.initial_factors()))
    # From the second batch of a step on, the gradients of those before are held beside the activations.
    gradients = 4 * count * (config.train.gradient_accumulation_steps > 1)
    activations = step.peak_bytes + gradients - 4 * count
    width, height = inputs.size_px
    one_image = torch.empty(1, 3, height, width, device=META)
    encoding = num_bytes(base.vae) + _peak_bytes(lambda: base.vae.encode(one_image))
    drawing_bytes, flops_per_prediction, flops_per_decoding = _preview_cost(inputs, base)
    beside = max(drawing_bytes, encoding)
    if inputs.on_cpu:
        second = proof_dtype(num_parameters, inputs.dtype).itemsize * num_parameters
        beside = max(beside, second + shapes.frozen_bytes + _verification_bytes(inputs, base, count))
    else:
        drawing = beside + shapes.vae_bytes + text_bytes * text_is_trained
        encoding_text = text_bytes - weights if base.model.network_waits else text_bytes
        beside = max(drawing, encoding_text) - in_a_step
    return MemoryEstimate(
        trainable_parameters=count,
        layers=adapter.summary(),
        base_parameters=adapter.num_base_parameters(),
        parts={
            "weights": weights,
            "adapter": (8 + state + start) * count,
            "activations": activations,
            "caches": inputs.cached_bytes,
            "overhead": _OVERHEAD_BYTES,
            "previews": max(0, beside - activations - 4 * count),
        },
        flops_per_step=step.flops,
        flops_per_prediction=flops_per_prediction,
        flops_per_decoding=flops_per_decoding,
        largest_layer=_largest_layer(adapter),
        # Each block computes forward and backward for every batch of a step.
        transferred_bytes=2 * block_bytes * config.train.gradient_accumulation_steps,
    )


def _largest_layer(adapter: Adapter) -> tuple[int, int]:
    layers = [(layer.down.numel() + layer.up.numel(), layer) for layer in adapter.layers.values()]
    added, layer = max(layers, key=lambda pair: pair[0])
    # Down is (r, i) or, of a convolution, (r, i, k, k); up is (o, r) or (o, r, 1, 1).
    return layer.down[0].numel() * layer.up.shape[0], added


def _step_cost(inputs: MemoryInputs, base: MetaBase, adapter: Adapter, model: TrainingModel) -> Cost:
    """Forward and backward pass of the largest batch, by the code that trains."""
    config, size = inputs.config, inputs.config.train.batch_size
    whole = cast(BaseModel, base)  # as much of one as the loss needs
    clean = empty_latents(inputs.shapes, size, inputs.size_px)
    timesteps = torch.zeros(size, dtype=torch.long, device=META)
    with model.forward_backward(), counted() as cost:
        batch = Batch(clean, torch.empty_like(clean), timesteps, base.text(size))
        if config.data.class_words:
            most = -(-size // config.train.preservation_every)
            with torch.no_grad():
                kept = base.text(most)
            plain, distance = diffusion_loss_with_prior(
                whole, adapter, batch, torch.arange(most, device=META), base.text(most), kept
            )
            objective = torch.cat([plain, distance])
        else:
            objective = diffusion_loss(whole, batch)
        torch.autograd.backward(objective.sum())
        del objective
    return cost


def _preview_cost(inputs: MemoryInputs, base: MetaBase) -> tuple[int, int, int]:
    """What drawing takes.

    Returns:
        Bytes beside the weights, of the UNet's prediction or of decoding the images; FLOPs of a prediction, and of
        decoding an image.
    """
    preview = inputs.config.preview
    width, height = preview.width_px or inputs.size_px[0], preview.height_px or inputs.size_px[1]
    peak, *flops = _drawing_cost(inputs, base, (width, height))
    own = [(one.width_px or width, one.height_px or height) for one in preview.prompts if not isinstance(one, str)]
    if prod(largest := max(own, key=prod, default=(0, 0))) > width * height:
        peak = max(peak, _drawing_cost(inputs, base, largest)[0])
    return peak if preview.enabled else 0, flops[0], flops[1]


def _drawing_cost(inputs: MemoryInputs, base: MetaBase, size: tuple[int, int]) -> tuple[int, int, int]:
    number = max(1, _PREVIEW_PIXELS // prod(size))
    noisy, codes = empty_latents(inputs.shapes, number, size), empty_codes(inputs.shapes, number, size)
    # Guidance predicts with the prompt and without.
    with torch.no_grad(), counted() as drawing:
        _predict(base, noisy.repeat(2, 1, 1, 1))
    with torch.no_grad(), counted() as decoding:
        base.vae.decode(codes)
    # The VAE is on the device only while it is used.
    peak = max(drawing.peak_bytes, num_bytes(base.vae) + decoding.peak_bytes)
    return peak, drawing.flops // (2 * number), decoding.flops // number


def _verification_bytes(inputs: MemoryInputs, base: MetaBase, count: int) -> int:
    """Bytes of verifying a file beside the second base model's float32 weights: its predictions, and the adapters."""
    number, edge = len(PROBED_TIMESTEPS), PROBE_EDGE * inputs.shapes.latent_factor
    predicting = _peak_bytes(lambda: _predict(base, empty_latents(inputs.shapes, number, (edge, edge))))
    return predicting * 4 // inputs.dtype.itemsize + 3 * 4 * count + _SECOND_BASE_BYTES


def _peak_bytes(compute: Callable[[], object]) -> int:
    with torch.no_grad(), counted() as cost:
        compute()
    return cost.peak_bytes


def _predict(base: MetaBase, noisy: Tensor) -> Tensor:
    number = len(noisy)
    return base.predict(noisy, torch.zeros(number, dtype=torch.long, device=META), base.text(number))
