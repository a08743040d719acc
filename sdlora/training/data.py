"""What the trainer reads: cached tensors by example and exposure.

Captions of all planned exposures are known before training, because they are a function of counters; so the
text encoder runs once per distinct caption and never in the loop, unless it is trained itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor

from sdlora.cache.tensors import Cache
from sdlora.config.schema import RunConfig
from sdlora.data.batches import Exposure
from sdlora.data.captions import caption_for_exposure, prior_caption
from sdlora.data.dataset import Dataset
from sdlora.events import Progress
from sdlora.models.base import TextEmbeddings

CaptionForExposure = Callable[[int, int], str]


@dataclass(frozen=True)
class TrainingData:
    """A dataset with its tensors at hand.

    Args:
        dataset: The images.
        cache: Filled with the moments and captions that the run will ask for.
        caption: (index of the example, exposure) to the caption trained at that exposure.
        preserved_caption: The same to the caption at which the base is preserved; None if it is not asked for.
        text_is_trained: Captions are encoded whenever they are asked for, through the adapter as it then is.
    """

    dataset: Dataset
    cache: Cache
    caption: CaptionForExposure
    prior_caption: CaptionForExposure | None = None
    text_is_trained: bool = False

    def fill(self, background: str, exposures: Iterable[Exposure] | None = None) -> Iterator[Progress]:
        """Compute what is missing for exposures that are planned; for the first of every image if none are named."""
        planned = [Exposure(i, 1) for i in range(len(self.dataset.examples))] if exposures is None else list(exposures)
        met = sorted({exposure.example for exposure in planned})
        yield from self.cache.fill_moments([self.dataset.examples[index] for index in met], background)
        if not self.text_is_trained:
            yield from self.cache.fill_text(self.captions(planned))

    def captions(self, exposures: Iterable[Exposure]) -> list[str]:
        """Every caption that exposures ask for, each once."""
        kinds = [self.caption] if self.prior_caption is None else [self.caption, self.prior_caption]
        asked = sorted((exposure.example, exposure.exposure) for exposure in exposures)
        return list(dict.fromkeys(caption(*exposure) for caption in kinds for exposure in asked))

    def identities(self) -> dict[str, str]:
        """What every filled image is, by name: a hash of its pixels, mask, caption, and the networks."""
        return {e.name: self.cache.identity(e) for e in self.dataset.examples if self.cache.knows(e)}

    def name(self, index: int) -> str:
        """The file name of an example."""
        return self.dataset.examples[index].name

    def moments(self, indices: Iterable[int]) -> Tensor:
        """The VAE's moments of examples of one size, (B, 2C, h, w) float16."""
        return self.cache.moments([self.dataset.examples[index] for index in indices])

    def mask(self, index: int) -> Tensor | None:
        """What counts of an example, (1, h, w) in [0, 1]; None if all of it does."""
        return self.cache.mask(self.dataset.examples[index])

    def text(self, exposures: list[tuple[int, int]]) -> TextEmbeddings:
        """Text states of (example, exposure) pairs, the batch first."""
        return self._encoded([self.caption(index, exposure) for index, exposure in exposures], exposures)

    def prior_text(self, exposures: list[tuple[int, int]]) -> TextEmbeddings:
        """Text states with a class word in the trigger's place, the batch first."""
        assert self.prior_caption is not None, "class words are set wherever preservation is asked for"
        return self._encoded([self.prior_caption(index, exposure) for index, exposure in exposures], exposures)

    def _encoded(self, captions: list[str], exposures: list[tuple[int, int]]) -> TextEmbeddings:
        base = self.cache.base
        states = base.encode_captions(captions) if self.text_is_trained else self.cache.text(captions)
        return states | base.image_states([self.dataset.examples[index] for index, _ in exposures])


def training_data(config: RunConfig, dataset: Dataset, cache: Cache) -> TrainingData:
    """The images of a run, with the captions that its configuration asks for at every exposure."""
    data = config.data

    def caption(index: int, exposure: int) -> str:
        example = dataset.examples[index]
        return caption_for_exposure(
            example.caption,
            trigger=example.trigger,
            shuffle_tags=data.shuffle_tags,
            keep_tags=data.keep_tags,
            dropout=data.caption_dropout,
            seed=config.seed,
            example=example.name,
            exposure=exposure,
        )

    def prior(index: int, exposure: int) -> str:
        example = dataset.examples[index]
        assert example.trigger is not None, "the schema asks for triggers where class words are preserved"
        return prior_caption(
            caption(index, exposure),
            trigger=example.trigger,
            class_words=data.class_words,
            seed=config.seed,
            example=example.name,
            exposure=exposure,
        )

    kept = prior if data.class_words else None
    return TrainingData(dataset, cache, caption, kept, "text_encoder" in config.lora.targets)


def validation_data(config: RunConfig, dataset: Dataset, cache: Cache) -> TrainingData:
    """The validation images, with their own captions as they are at every exposure."""
    captions = [example.prompt for example in dataset.examples]
    text_is_trained = "text_encoder" in config.lora.targets
    return TrainingData(dataset, cache, lambda index, _: captions[index], text_is_trained=text_is_trained)
