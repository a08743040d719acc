"""The loss of exposures: batches of latents, noise and text, and how far the model's predictions are from the target.

Each step of training sums terms of this kind; validation and the copy check measure with the same function, at fixed
timesteps and with fixed noise, so that epochs differ only by what was learned.
Shapes: B batch, C latent channels, h/w latents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from sdlora.common import seeds
from sdlora.data.batches import Exposure
from sdlora.data.dataset import Example
from sdlora.diffusion.losses import huber_delta, huber_per_example, loss_weight, mse_per_example
from sdlora.diffusion.noise import multires_noise
from sdlora.models.base import BaseModel, TextEmbeddings
from sdlora.training.data import ExposureSchedule, TrainingData
from sdlora.training.settings import TrainingSettings

Error = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(predicted, target, weights), (B, C, h, w) twice and (B, 1, h, w) or None, to a loss per example, (B,)."""


@dataclass(frozen=True)
class Batch:
    """The network's inputs, and how its errors are weighted.

    Attributes:
        latents: Clean scaled latents, (B, C, h, w).
        noise: Standard normal noise, (B, C, h, w).
        timesteps: Integers in [0, 999], (B,).
        text: Text embeddings, the batch first.
        weights: Weight of each place in the loss, (B, 1, h, w); None for equal weights.
        unasked: Further noise in the input that is not to be predicted, (B, C, h, w); None for none.
    """

    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    text: TextEmbeddings
    weights: Tensor | None = None
    unasked: Tensor | None = None


ExtraLoss = Callable[[Batch, Sequence[Exposure], Error], tuple[Tensor, Tensor]]
"""Batch, its exposures and an error to the loss (B,) and what is added to the weighted loss, (B,)."""


class ExposureLoss:
    """The loss of exposures of one set of images; noise is a function of (seed, image, exposure).

    Args:
        data: Its cache is filled for every exposure that is asked for.
        settings: How predictions are compared with the target.
        extra: Computes the loss together with what is added to it; None adds nothing.
    """

    def __init__(self, data: TrainingData, settings: TrainingSettings, extra: ExtraLoss | None = None) -> None:
        self.base, self.data, self.settings, self.extra = data.cache.base, data, settings, extra

    def __call__(self, exposures: Sequence[Exposure], timesteps: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The loss of B exposures of images of one size at given timesteps.

        Returns:
            The loss before any weighting, and the objective that is minimised, each (B,) float32.
        """
        latents, noise = self.latents_and_noise(exposures)
        weights = self._mask_weights(exposures, latents)
        batch = Batch(
            latents,
            noise,
            torch.tensor(list(timesteps)),
            self.data.text(exposures),
            weights,
            self._unasked(exposures, noise),
        )
        levels, at = self.base.levels, batch.timesteps.to(self.base.device)
        error = self._error_at(at)
        if self.extra is None:
            loss, extra = diffusion_loss(self.base, batch, error), None
        else:
            loss, extra = self.extra(batch, exposures, error)
        weight = loss_weight(self.settings.weighting, levels, at, self.settings.gamma)
        of_sets = [self.data.dataset.examples[exposure.example].loss_weight for exposure in exposures]
        if any(factor != 1 for factor in of_sets):
            weight = weight * torch.tensor(of_sets).to(weight)
        return loss, weight * loss if extra is None else weight * loss + extra

    def _error_at(self, timesteps: Tensor) -> Error:
        settings = self.settings
        if settings.kind == "mse":
            return mse_per_example
        if settings.huber_schedule == "constant":
            return partial(huber_per_example, delta=settings.huber_delta)
        delta = huber_delta(settings.huber_schedule, settings.huber_delta, self.base.levels, timesteps)
        return partial(huber_per_example, delta=delta)

    def _unasked(self, exposures: Sequence[Exposure], noise: Tensor) -> Tensor | None:
        """Source: Ning et al. 2301.11706, algorithm 1."""
        if self.settings.input_perturbation == 0:
            return None
        return self.settings.input_perturbation * self._drawn("input perturbation", exposures, *noise.shape[1:])

    def _drawn(self, purpose: str, exposures: Sequence[Exposure], *shape: int) -> Tensor:
        """Standard normal noise of every exposure."""
        names = [(self.data.name(exposure.example), exposure.number) for exposure in exposures]
        return torch.stack([seeds.normal(shape, self.settings.seed, purpose, *name) for name in names])

    def latents_and_noise(self, exposures: Sequence[Exposure]) -> tuple[Tensor, Tensor]:
        """Latents drawn from the VAE's posterior, and the noise that is added to them, each (B, C, h, w) on the CPU."""
        moments = self.data.cache.moments(self._seen(exposures))
        num_channels, height, width = moments.shape[1] // 2, *moments.shape[2:]
        drawn = self._drawn("latent", exposures, num_channels, height, width)
        latents = self.base.sample_latents(moments, drawn)
        noise = self._drawn("noise", exposures, num_channels, height, width)
        if self.settings.multires_discount > 0:
            pairs = zip(noise, exposures, strict=True)
            noise = torch.stack([self._multires(own, exposure) for own, exposure in pairs])
        if self.settings.noise_offset > 0:
            offset = self.settings.noise_offset * self._drawn("noise offset", exposures, num_channels, 1, 1)
            noise = noise + (offset * self._strengths(exposures) if self.settings.noise_offset_random else offset)
        return latents, noise

    def _multires(self, noise: Tensor, exposure: Exposure) -> Tensor:
        seed, name = self.settings.seed, (self.data.name(exposure.example), exposure.number)
        return multires_noise(
            noise,
            self.settings.multires_discount,
            lambda level, *size: seeds.normal((len(noise), *size), seed, "noise level", level, *name),
            lambda level: seeds.uniform(seed, "noise level ratio", level, *name),
        )

    def _strengths(self, exposures: Sequence[Exposure]) -> Tensor:
        names = [(self.data.name(exposure.example), exposure.number) for exposure in exposures]
        drawn = [seeds.uniform(self.settings.seed, "noise offset strength", *name) for name in names]
        return torch.tensor(drawn, dtype=torch.float32).view(-1, 1, 1, 1)

    def _seen(self, exposures: Sequence[Exposure]) -> list[Example]:
        return [self.data.dataset.examples[exposure.example].at_exposure(exposure.number) for exposure in exposures]

    def _mask_weights(self, exposures: Sequence[Exposure], latents: Tensor) -> Tensor | None:
        """The weight of each place, (B, 1, h, w); None if no image has a mask."""
        masks = [self.data.cache.mask(example) for example in self._seen(exposures)]
        if all(mask is None for mask in masks):
            return None
        whole = torch.ones(1, *latents.shape[2:])
        shares = torch.stack([whole if mask is None else mask for mask in masks])
        return self.settings.mask_floor + (1 - self.settings.mask_floor) * shares


@dataclass(frozen=True)
class Term:
    """One term of the objective: in every step, the mean over its exposures times its weight.

    Attributes:
        schedule: The exposures of its images.
        weight: Above 0.
    """

    loss: ExposureLoss
    schedule: ExposureSchedule
    weight: float = 1.0


def diffusion_loss(base: BaseModel, batch: Batch, error: Error = mse_per_example) -> Tensor:
    """The simple loss of each example of a batch, on any device, at its timestep.

    Returns:
        (B,) float32 on the base model's device.

    Source: Ho et al. 2006.11239, equation 14; for v, Salimans & Ho 2202.00512, section 4; for flow matching, Lipman et
    al. 2210.02747, equation 5.
    """
    noisy, timesteps, target = noised(base, batch)
    return error(base.predict(noisy, timesteps, text_on_device(base, batch.text)), target, batch.weights)


def noised(base: BaseModel, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy latents, timesteps and the target, on the base model's device."""
    latents, noise, timesteps = (on_device(base, x) for x in (batch.latents, batch.noise, batch.timesteps))
    levels = base.levels
    inside = noise if batch.unasked is None else noise + on_device(base, batch.unasked)
    return levels.mix(latents, inside, timesteps), timesteps, levels.target(latents, noise, timesteps)


def text_on_device(base: BaseModel, text: TextEmbeddings) -> TextEmbeddings:
    """Text embeddings on the base model's device."""
    return {name: on_device(base, value) for name, value in text.items()}


def on_device(base: BaseModel, tensor: Tensor) -> Tensor:
    """A tensor on the base model's device; from pinned memory, so that the copy to a GPU does not block."""
    if base.device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(base.device, non_blocking=True)
