"""The exposure schedule: which image is trained in which optimizer step, and at which timestep.

Made before training from settings and images alone, so a resumed run follows the same schedule.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from sdlora.data.batches import Exposure, epoch_batches
from sdlora.data.dataset import Dataset
from sdlora.diffusion.stratify import cover
from sdlora.training.settings import TrainingSettings

Step = list[tuple[Exposure, ...]]
"""An optimizer step: batches whose gradients are summed."""


@dataclass(frozen=True)
class ExposureSchedule:
    """All exposures of one set of images.

    Attributes:
        epochs: The optimizer steps of each epoch; a step without batches exposes none of these images.
        timesteps: The timestep of each exposure, in the order of training.
    """

    epochs: list[list[Step]]
    timesteps: dict[Exposure, int]

    @cached_property
    def steps(self) -> list[Step]:
        """The optimizer steps of all epochs."""
        return [step for steps in self.epochs for step in steps]


def make_schedule(settings: TrainingSettings, dataset: Dataset) -> ExposureSchedule:
    """Expose every image as often as its repeats say, in every epoch."""
    buckets = [example.bucket for example in dataset.examples]
    repeats = [example.repeats for example in dataset.examples]
    size = settings.gradient_accumulation_steps
    epochs: list[list[Step]] = []
    for epoch in range(1, settings.epochs + 1):
        batches = epoch_batches(buckets, repeats, settings.batch_size, epoch, settings.seed)
        epochs.append([batches[first : first + size] for first in range(0, len(batches), size)])
    return with_timesteps(settings, dataset, epochs, settings.seed)


def with_timesteps(
    settings: TrainingSettings, dataset: Dataset, epochs: list[list[Step]], seed: int
) -> ExposureSchedule:
    """Draw the timestep of every exposure, which completes a schedule."""
    steps = [[exposure for batch in step for exposure in batch] for epoch in epochs for step in epoch]
    named = [[(dataset.examples[exposure.example].name, exposure.number) for exposure in step] for step in steps]
    draws = cover(settings.coverage, named, seed)
    timesteps = {
        exposure: settings.density.timestep(draw)
        for step, drawn in zip(steps, draws, strict=True)
        for exposure, draw in zip(step, drawn, strict=True)
    }
    return ExposureSchedule(epochs, timesteps)
