"""Training data: which image is trained in which step and at which timestep, and the cached tensors of its exposures.

Read by the loss. Schedule and captions are functions of settings, images and counters, so all are known before
training, and a resumed run follows the same ones; the text encoder runs once per distinct caption and never in the
loop, unless it is trained itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from torch import Tensor

from sdlora.cache.tensors import Cache
from sdlora.data.batches import Exposure, count_batches, epoch_batches
from sdlora.data.captions import caption_for_exposure, prior_caption
from sdlora.data.dataset import Dataset, Example
from sdlora.diffusion.timesteps import cover
from sdlora.events import Progress
from sdlora.models.base import TextEmbeddings
from sdlora.training.settings import TrainingSettings

Step = list[tuple[Exposure, ...]]
"""An optimizer step: batches whose gradients are summed."""

CaptionForExposure = Callable[[int, int], str]


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
    return with_timesteps(settings, dataset, make_steps(settings, dataset), settings.seed)


def make_steps(settings: TrainingSettings, dataset: Dataset) -> list[list[Step]]:
    """The optimizer steps of every epoch, without their timesteps."""
    buckets = [example.buckets for example in dataset.examples]
    repeats = [example.repeats for example in dataset.examples]
    size = settings.gradient_accumulation_steps
    epochs: list[list[Step]] = []
    for epoch in range(1, settings.epochs + 1):
        batches = epoch_batches(buckets, repeats, settings.batch_size, epoch, settings.seed)
        epochs.append([batches[first : first + size] for first in range(0, len(batches), size)])
    return epochs


def num_steps(settings: TrainingSettings, dataset: Dataset) -> int:
    """The number of optimizer steps that `make_steps` gives."""
    buckets = [example.buckets for example in dataset.examples]
    repeats = [example.repeats for example in dataset.examples]
    per_step = settings.gradient_accumulation_steps
    return sum(
        -(-count_batches(buckets, repeats, settings.batch_size, epoch) // per_step)
        for epoch in range(1, settings.epochs + 1)
    )


def with_timesteps(
    settings: TrainingSettings, dataset: Dataset, epochs: list[list[Step]], seed: int
) -> ExposureSchedule:
    """Draw the timestep of every exposure, which completes a schedule."""
    steps = [[exposure for batch in step for exposure in batch] for epoch in epochs for step in epoch]
    examples = dataset.examples
    named = [[(examples[exposure.example].name, exposure.number) for exposure in step] for step in steps]
    draws = cover(settings.coverage, named, seed)
    timesteps = {
        exposure: settings.density.at(examples[exposure.example].at_exposure(exposure.number).bucket).timestep(draw)
        for step, drawn in zip(steps, draws, strict=True)
        for exposure, draw in zip(step, drawn, strict=True)
    }
    return ExposureSchedule(epochs, timesteps)


@dataclass(frozen=True)
class TrainingData:
    """A dataset and its cached tensors.

    Args:
        cache: Filled with the moments and captions of the exposures that are read.
        caption: (index of the example, exposure) to the caption of that exposure.
        prior_caption: The same to the caption with a class word, for prior preservation; None without class words.
        text_is_trained: Captions are encoded whenever they are read, by the text encoder with its adapter.
    """

    dataset: Dataset
    cache: Cache
    caption: CaptionForExposure
    prior_caption: CaptionForExposure | None = None
    text_is_trained: bool = False

    def fill(self, background: str, exposures: Iterable[Exposure] | None = None) -> Iterator[Progress]:
        """Fill the cache for exposures; for the first exposure of every image if none are given."""
        planned = [Exposure(i, 1) for i in range(len(self.dataset.examples))] if exposures is None else list(exposures)
        yield from self.cache.fill_moments(self.seen(planned), background)
        if not self.text_is_trained:
            yield from self.cache.fill_text(self.captions(planned))

    def seen(self, exposures: Iterable[Exposure]) -> list[Example]:
        """The distinct examples of exposures, in each of their sizes, as they are and mirrored."""
        examples = self.dataset.examples
        met = sorted({(e.example, examples[e.example].first_like(e.number)) for e in exposures})
        return list(dict.fromkeys(examples[index].at_exposure(number) for index, number in met))

    def captions(self, exposures: Iterable[Exposure]) -> list[str]:
        """The distinct captions of exposures."""
        kinds = [self.caption] if self.prior_caption is None else [self.caption, self.prior_caption]
        asked = sorted(exposures)
        return list(dict.fromkeys(caption(*exposure) for caption in kinds for exposure in asked))

    def identities(self) -> dict[str, str]:
        """A hash of pixels, mask, caption and networks, by name, of every image in the cache."""
        first = [example.at_exposure(1) for example in self.dataset.examples]
        return {example.name: self.cache.identity(example) for example in first if self.cache.knows(example)}

    def name(self, index: int) -> str:
        """The file name of an example."""
        return self.dataset.examples[index].name

    def moments(self, indices: Iterable[int]) -> Tensor:
        """The VAE's moments of the first exposures of examples of one size, (B, 2C, h, w) float16."""
        return self.cache.moments([self.dataset.examples[index].at_exposure(1) for index in indices])

    def text(self, exposures: Sequence[tuple[int, int]]) -> TextEmbeddings:
        """Text embeddings of exposures, the batch first."""
        return self._encoded(self.caption, exposures)

    def prior_text(self, exposures: Sequence[tuple[int, int]]) -> TextEmbeddings:
        """Text embeddings with a class word in the trigger's place, the batch first."""
        assert self.prior_caption is not None, "only called with class words"
        return self._encoded(self.prior_caption, exposures)

    def _encoded(self, caption: CaptionForExposure, exposures: Sequence[tuple[int, int]]) -> TextEmbeddings:
        base, captions = self.cache.base, [caption(*exposure) for exposure in exposures]
        text = base.encode_captions(captions) if self.text_is_trained else self.cache.text(captions)
        seen = [self.dataset.examples[index].at_exposure(number) for index, number in exposures]
        return text | base.size_conditions(seen)


def training_data(settings: TrainingSettings, dataset: Dataset, cache: Cache) -> TrainingData:
    """A dataset with a caption for every exposure."""

    def caption(index: int, exposure: int) -> str:
        example = dataset.examples[index]
        return caption_for_exposure(
            example.caption,
            example.captions,
            trigger=example.trigger,
            seed=settings.seed,
            example=example.name,
            exposure=exposure,
        )

    def with_class_word(index: int, exposure: int) -> str:
        example = dataset.examples[index]
        assert example.trigger is not None, "the schema requires triggers with class words"
        return prior_caption(
            caption(index, exposure),
            trigger=example.trigger,
            class_words=settings.class_words,
            seed=settings.seed,
            example=example.name,
            exposure=exposure,
        )

    prior = with_class_word if settings.class_words else None
    return TrainingData(dataset, cache, caption, prior, settings.text_is_trained)


def evaluation_data(dataset: Dataset, cache: Cache, *, text_is_trained: bool) -> TrainingData:
    """A dataset with the fixed form of its captions at every exposure, as validation and the copy check need it."""
    captions = [example.prompt for example in dataset.examples]
    dataset = replace(dataset, examples=tuple(example.as_evaluated() for example in dataset.examples))
    return TrainingData(dataset, cache, lambda index, _: captions[index], text_is_trained=text_is_trained)
