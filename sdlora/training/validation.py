"""The loss on images that are never trained on, at noise levels and noise that never change.

The same numbers are asked of every epoch, so that two epochs differ by what was learned and by nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from sdlora.common import seeds
from sdlora.diffusion.bands import NUM_BANDS
from sdlora.diffusion.timesteps import NUM_TIMESTEPS
from sdlora.events import EpochDone
from sdlora.lora.inject import Adapter
from sdlora.training.data import TrainingData
from sdlora.training.loss import Batch, diffusion_loss

LEVELS_PER_BAND = 2
NUM_LEVELS = NUM_BANDS * LEVELS_PER_BAND


class Validation:
    """Measures an adapter on validation images.

    Args:
        data: The validation images; their own captions are used as they are.
        adapter: What is measured; switched off, it gives the losses of the base.
        seed: The run's seed, for the noise.

    Attributes:
        losses_off: Of the base, as `image_losses` gives them for all images; None until measured.
        losses_on: The same with the adapter, as last measured.
    """

    def __init__(self, data: TrainingData, adapter: Adapter, seed: int) -> None:
        self.data = data
        self._adapter = adapter
        self._seed = seed
        self.losses_off: Tensor | None = None
        self.losses_on: Tensor | None = None

    def measure(self, event: EpochDone) -> EpochDone:
        """The event with its validation losses: their mean, by band, and by band the adapter on minus off."""
        indices = range(len(self.data.dataset.examples))
        if self.losses_off is None:
            # The base never changes, so one look is enough, whether the run begins here or goes on.
            with self._adapter.disabled():
                self.losses_off = image_losses(self.data, indices, self._seed)
        self.losses_on = image_losses(self.data, indices, self._seed)
        bands, off_bands = _means(self.losses_on), _means(self.losses_off)
        return replace(
            event,
            validation_loss=sum(bands) / NUM_BANDS,
            validation_bands=bands,
            validation_change=[on - off for on, off in zip(bands, off_bands, strict=True)],
        )


@torch.no_grad()
def image_losses(data: TrainingData, indices: Sequence[int], seed: int) -> Tensor:
    """Mean squared error of each image at fixed noise levels, with noise that depends on nothing but its name.

    Every image is asked at the middles of ten equal slices of the timesteps, two to a band.

    Args:
        data: Any images, trained or held out.
        indices: Which of them, P in all.
        seed: The run's seed, for the noise.

    Returns:
        (P, NUM_BANDS, LEVELS_PER_BAND) on the base's device, unweighted, from the lowest noise to the highest.
    """
    base = data.cache.base
    levels = [int((level + 0.5) * NUM_TIMESTEPS / NUM_LEVELS) for level in range(NUM_LEVELS)]
    losses: list[Tensor] = []
    for index in indices:
        moments = data.moments([index])
        mean = moments.chunk(2, dim=1)[0]
        noise = [seeds.normal(mean.shape[1:], seed, "heldout noise", data.name(index), level) for level in levels]
        text = {name: states.expand(NUM_LEVELS, *states.shape[1:]) for name, states in data.text([(index, 1)]).items()}
        latents = base.sample_latents(moments, torch.zeros_like(mean)).expand(NUM_LEVELS, -1, -1, -1)
        losses.append(diffusion_loss(base, Batch(latents, torch.stack(noise), torch.tensor(levels), text)))
    return torch.stack(losses).view(-1, NUM_BANDS, LEVELS_PER_BAND)


def _means(losses: Tensor) -> list[float]:
    """By band, over (P, NUM_BANDS, LEVELS_PER_BAND)."""
    means: list[float] = losses.mean(dim=(0, 2)).tolist()
    return means
