"""What the trainer reads: cached tensors by example and visit.

Captions of all planned visits are known before training, because they are a function of counters; so the
text encoder runs once per distinct caption and never in the loop, unless it is trained itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor

from sdlora.cache.tensors import Cache
from sdlora.config.schema import RunConfig
from sdlora.data.batches import Visit
from sdlora.data.captions import caption_for_visit, preserved_caption
from sdlora.data.dataset import Dataset
from sdlora.events import Progress
from sdlora.models.base import TextStates

CaptionForVisit = Callable[[int, int], str]


@dataclass(frozen=True)
class TrainingData:
    """A dataset with its tensors at hand.

    Args:
        dataset: The pictures.
        cache: Filled with the moments and captions that the run will ask for.
        caption: (index of the example, visit) to the caption trained at that visit.
        preserved_caption: The same to the caption at which the base is preserved; None if it is not asked for.
        text_is_trained: Captions are encoded whenever they are asked for, through the adapter as it then is.
    """

    dataset: Dataset
    cache: Cache
    caption: CaptionForVisit
    preserved_caption: CaptionForVisit | None = None
    text_is_trained: bool = False

    def fill(self, background: str, visits: Iterable[Visit] | None = None) -> Iterator[Progress]:
        """Compute what is missing for visits that are planned; for the first of every picture if none are named."""
        planned = [Visit(i, 1) for i in range(len(self.dataset.examples))] if visits is None else list(visits)
        met = sorted({visit.example for visit in planned})
        yield from self.cache.fill_moments([self.dataset.examples[index] for index in met], background)
        if not self.text_is_trained:
            yield from self.cache.fill_text(self.captions(planned))

    def captions(self, visits: Iterable[Visit]) -> list[str]:
        """Every caption that visits ask for, each once."""
        kinds = [self.caption] if self.preserved_caption is None else [self.caption, self.preserved_caption]
        asked = sorted((visit.example, visit.visit) for visit in visits)
        return list(dict.fromkeys(caption(*visit) for caption in kinds for visit in asked))

    def identities(self) -> dict[str, str]:
        """What every filled picture is, by name: a hash of its pixels, mask, caption, and the networks."""
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

    def text(self, visits: list[tuple[int, int]]) -> TextStates:
        """Text states of (example, visit) pairs, the batch first."""
        return self._encoded([self.caption(index, visit) for index, visit in visits], visits)

    def preserved_text(self, visits: list[tuple[int, int]]) -> TextStates:
        """Text states with a class word in the trigger's place, the batch first."""
        assert self.preserved_caption is not None, "class words are set wherever preservation is asked for"
        return self._encoded([self.preserved_caption(index, visit) for index, visit in visits], visits)

    def _encoded(self, captions: list[str], visits: list[tuple[int, int]]) -> TextStates:
        base = self.cache.base
        states = base.encode_captions(captions) if self.text_is_trained else self.cache.text(captions)
        return states | base.picture_states([self.dataset.examples[index] for index, _ in visits])


def training_data(config: RunConfig, dataset: Dataset, cache: Cache) -> TrainingData:
    """The pictures of a run, with the captions that its configuration asks for at every visit."""
    data = config.data

    def caption(index: int, visit: int) -> str:
        example = dataset.examples[index]
        return caption_for_visit(
            example.caption,
            trigger=example.trigger,
            shuffle_tags=data.shuffle_tags,
            keep_tags=data.keep_tags,
            dropout=data.caption_dropout,
            seed=config.seed,
            example=example.name,
            visit=visit,
        )

    def preserved(index: int, visit: int) -> str:
        example = dataset.examples[index]
        assert example.trigger is not None, "the schema asks for triggers where class words are preserved"
        return preserved_caption(
            caption(index, visit),
            trigger=example.trigger,
            class_words=data.class_words,
            seed=config.seed,
            example=example.name,
            visit=visit,
        )

    kept = preserved if data.class_words else None
    return TrainingData(dataset, cache, caption, kept, "text_encoder" in config.lora.targets)


def held_out_data(config: RunConfig, dataset: Dataset, cache: Cache) -> TrainingData:
    """The held-out pictures, with their own captions as they are at every visit."""
    captions = [example.prompt for example in dataset.examples]
    text_is_trained = "text_encoder" in config.lora.targets
    return TrainingData(dataset, cache, lambda index, _: captions[index], text_is_trained=text_is_trained)
