"""The validation loss: on images that are never trained, at fixed timesteps and with fixed noise.

Measured at the end of every epoch, so that epochs differ only by what was learned; the copy check measures training
images in the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from sdlora.common import seeds
from sdlora.diffusion.timesteps import NUM_BANDS, NUM_TIMESTEPS
from sdlora.events import EpochDone
from sdlora.lora.inject import Adapter
from sdlora.training.data import TrainingData
from sdlora.training.loss import Batch, diffusion_loss

TIMESTEPS_PER_BAND = 2
NUM_MEASURED = NUM_BANDS * TIMESTEPS_PER_BAND


class Validation:
    """Measures an adapter on validation images with their own captions.

    Attributes:
        losses_off: The base model's losses of all images, see `image_losses`; None until measured.
        losses_on: Those with the adapter, as last measured.
    """

    def __init__(self, data: TrainingData, adapter: Adapter, seed: int) -> None:
        self.data = data
        self._adapter = adapter
        self._seed = seed
        self.losses_off: Tensor | None = None
        self.losses_on: Tensor | None = None

    def measure(self, event: EpochDone) -> EpochDone:
        """The event with its validation losses: mean, by band, and by band with the adapter on minus off."""
        indices = range(len(self.data.dataset.examples))
        if self.losses_off is None:
            # The base model never changes, so it is measured once, whether the run starts or resumes.
            with self._adapter.disabled():
                self.losses_off = image_losses(self.data, indices, self._seed)
        self.losses_on = image_losses(self.data, indices, self._seed)
        # By band, over (P, NUM_BANDS, TIMESTEPS_PER_BAND).
        bands, off_bands = (losses.mean(dim=(0, 2)).tolist() for losses in (self.losses_on, self.losses_off))
        return replace(
            event,
            validation_loss=sum(bands) / NUM_BANDS,
            validation_bands=bands,
            validation_change=[on - off for on, off in zip(bands, off_bands, strict=True)],
        )


@torch.no_grad()
def image_losses(data: TrainingData, indices: Sequence[int], seed: int) -> Tensor:
    """Mean squared error of each image at fixed timesteps, with noise that depends only on its name and the seed.

    The timesteps are the middles of ten equal slices, two to a band.

    Returns:
        (P, NUM_BANDS, TIMESTEPS_PER_BAND) for P indices, on the base model's device, unweighted, from the lowest noise
        to the highest.
    """
    base = data.cache.base
    timesteps = [int((index + 0.5) * NUM_TIMESTEPS / NUM_MEASURED) for index in range(NUM_MEASURED)]
    losses: list[Tensor] = []
    for index in indices:
        moments = data.moments([index])
        mean = moments.chunk(2, dim=1)[0]
        noise = [seeds.normal(mean.shape[1:], seed, "heldout noise", data.name(index), t) for t in timesteps]
        text = {name: value.expand(NUM_MEASURED, *value.shape[1:]) for name, value in data.text([(index, 1)]).items()}
        latents = base.sample_latents(moments, torch.zeros_like(mean)).expand(NUM_MEASURED, -1, -1, -1)
        losses.append(diffusion_loss(base, Batch(latents, torch.stack(noise), torch.tensor(timesteps), text)))
    return torch.stack(losses).view(-1, NUM_BANDS, TIMESTEPS_PER_BAND)
