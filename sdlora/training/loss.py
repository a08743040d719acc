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
from sdlora.diffusion.losses import huber_per_example, loss_weight, mse_per_example
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
    """

    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    text: TextEmbeddings
    weights: Tensor | None = None


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
        huber = partial(huber_per_example, delta=settings.huber_delta)
        self._error: Error = mse_per_example if settings.kind == "mse" else huber

    def __call__(self, exposures: Sequence[Exposure], timesteps: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The loss of B exposures of images of one size at given timesteps.

        Returns:
            The loss before any weighting, and the objective that is minimised, each (B,) float32.
        """
        latents, noise = self.latents_and_noise(exposures)
        weights = self._mask_weights(exposures, latents)
        batch = Batch(latents, noise, torch.tensor(list(timesteps)), self.data.text(exposures), weights)
        if self.extra is None:
            loss, extra = diffusion_loss(self.base, batch, self._error), None
        else:
            loss, extra = self.extra(batch, exposures, self._error)
        levels, at = self.base.levels, batch.timesteps.to(self.base.device)
        weight = loss_weight(self.settings.weighting, levels, at, self.settings.gamma)
        return loss, weight * loss if extra is None else weight * loss + extra

    def latents_and_noise(self, exposures: Sequence[Exposure]) -> tuple[Tensor, Tensor]:
        """Latents drawn from the VAE's posterior, and the noise that is added to them, each (B, C, h, w) on the CPU."""
        moments = self.data.cache.moments(self._seen(exposures))
        names = [(self.data.name(exposure.example), exposure.number) for exposure in exposures]
        num_channels, height, width = moments.shape[1] // 2, *moments.shape[2:]

        def draw(purpose: str, *shape: int) -> Tensor:
            return torch.stack([seeds.normal(shape, self.settings.seed, purpose, *name) for name in names])

        latents = self.base.sample_latents(moments, draw("latent", num_channels, height, width))
        noise = draw("noise", num_channels, height, width)
        if self.settings.noise_offset > 0:
            noise = noise + self.settings.noise_offset * draw("noise offset", num_channels, 1, 1)
        return latents, noise

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
    return levels.mix(latents, noise, timesteps), timesteps, levels.target(latents, noise, timesteps)


def text_on_device(base: BaseModel, text: TextEmbeddings) -> TextEmbeddings:
    """Text embeddings on the base model's device."""
    return {name: on_device(base, value) for name, value in text.items()}


def on_device(base: BaseModel, tensor: Tensor) -> Tensor:
    """A tensor on the base model's device; from pinned memory, so that the copy to a GPU does not block."""
    if base.device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(base.device, non_blocking=True)
