"""The plan of exposures: which image is met in which optimizer step, and at which timestep. All of it is known before.

Everything is a function of the configuration and the images, so a resumed run goes on in the same plan.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, count, islice

from sdlora.common import seeds
from sdlora.config.schema import RunConfig, TimestepsConfig
from sdlora.data.batches import Exposure, epoch_batches
from sdlora.data.dataset import Dataset
from sdlora.diffusion.stratify import cover
from sdlora.diffusion.timesteps import Density

Step = list[tuple[Exposure, ...]]
"""An optimizer step: batches whose gradients are summed."""


@dataclass(frozen=True)
class Plan:
    """Exposures of one set of images.

    Attributes:
        epochs: The optimizer steps of each epoch; a step without batches meets none of these images.
        timesteps: The timestep of each exposure.
        kept: Exposures at which the base's answer to class words is kept as well, where it is kept at all.
    """

    epochs: list[list[Step]] = field(default_factory=list)
    timesteps: dict[Exposure, int] = field(default_factory=dict)
    kept: frozenset[Exposure] = frozenset()


def plan_training(config: RunConfig, dataset: Dataset) -> Plan:
    """Every image as often as its repeats say, in every epoch."""
    train = config.train
    buckets = [example.bucket for example in dataset.examples]
    repeats = [example.repeats for example in dataset.examples]
    size = train.gradient_accumulation_steps
    epochs: list[list[Step]] = []
    for epoch in range(1, train.epochs + 1):
        batches = epoch_batches(buckets, repeats, train.batch_size, epoch, config.seed)
        epochs.append([batches[first : first + size] for first in range(0, len(batches), size)])
    timesteps = _timesteps(config.timesteps, dataset, epochs, config.seed)
    batches = [batch for steps in epochs for step in steps for batch in step]
    return Plan(epochs, timesteps, one_in(train.preservation_every, batches, timesteps, config.seed))


def one_in(
    every: int, batches: Sequence[Sequence[Exposure]], timesteps: Mapping[Exposure, int], seed: int
) -> frozenset[Exposure]:
    """One in so many exposures of every batch: each is as likely as another, and they are spread over the noise levels.

    Source: systematic sampling with a random start (Madow and Madow 1944).
    """
    chosen: set[Exposure] = set()
    for number, batch in enumerate(batches):
        start = seeds.derive(seed, "kept visits", number) % every
        chosen.update(sorted(batch, key=timesteps.__getitem__)[start::every])
    return frozenset(chosen)


def plan_prior(config: RunConfig, dataset: Dataset, training: Plan) -> Plan:
    """As many batches of images of what is preserved as each step has batches that are trained.

    The images come in rounds, each in an order of its own, and go on from step to step and from epoch to epoch.
    """
    seed = seeds.derive(config.seed, "preserved pictures")
    buckets = [example.bucket for example in dataset.examples]
    rounds = (epoch_batches(buckets, 1, config.train.batch_size, number, seed) for number in count(1))
    batches = chain.from_iterable(rounds)
    epochs = [[list(islice(batches, len(step))) for step in steps] for steps in training.epochs]
    return Plan(epochs, _timesteps(config.timesteps, dataset, epochs, seed))


def _timesteps(
    options: TimestepsConfig, dataset: Dataset, epochs: Sequence[Sequence[Step]], seed: int
) -> dict[Exposure, int]:
    density = Density(
        options.density,
        mean=options.mean,
        std=options.std,
        minimum=options.min,
        maximum=options.max,
        high_noise_keep=options.high_noise_keep,
    )
    steps = [[exposure for batch in step for exposure in batch] for epoch in epochs for step in epoch]
    named = [[(dataset.examples[exposure.example].name, exposure.exposure) for exposure in step] for step in steps]
    draws = cover(options.coverage, named, seed)
    return {
        exposure: density.timestep(draw)
        for step, drawn in zip(steps, draws, strict=True)
        for exposure, draw in zip(step, drawn, strict=True)
    }
