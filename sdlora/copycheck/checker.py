"""Previews drawn, compared and measured together: what happens at the end of an epoch, and to a finished file."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from PIL import Image
from torch import Tensor

from sdlora.cache.tensors import Cache
from sdlora.copycheck import signals
from sdlora.copycheck.embedders import Arbiters
from sdlora.copycheck.null_distribution import Gallery, NullMaker, reduced, spread_over
from sdlora.copycheck.signals import Signal
from sdlora.copycheck.verdict import EpochCheck, check_previews
from sdlora.copycheck.warp_alignment import registered
from sdlora.events import CopyChecked, Event, Progress
from sdlora.lora.inject import Adapter
from sdlora.previews.guidance_norm import SamplerWatch
from sdlora.previews.sampler import PreviewRequest, draw_epoch
from sdlora.training.data import TrainingData
from sdlora.training.validation import Validation, image_losses

T = TypeVar("T")


@dataclass(frozen=True)
class Subject:
    """What is checked, and on what.

    Attributes:
        adapter: On its base.
        data: The training images with their captions as they are, at every exposure the same.
        heldout: Measures validation images; None if there are none.
        cache: Where the null is kept; it knows the base.
        identity: A hash of the base's UNet.
        seed: The run's.
    """

    adapter: Adapter
    data: TrainingData
    validation: Validation | None
    cache: Cache
    identity: str
    seed: int


class Checker:
    """Draws previews and says whether they are copies.

    Args:
        subject: What is checked.
        request: What to draw.
        gallery: The images that may have been copied, and others of their kind.
        arbiters: Networks that are asked as well.
    """

    def __init__(self, subject: Subject, request: PreviewRequest, gallery: Gallery, arbiters: Arbiters) -> None:
        self._subject, self._request, self._gallery, self._arbiters = subject, request, gallery, arbiters
        self._base = subject.cache.base
        self._nulls = NullMaker(subject.cache, subject.adapter, request, gallery, subject.identity, arbiters)
        count = len(subject.data.dataset.examples)
        self._probed = spread_over(count, signals.MOST_PROBED)
        self._compared = spread_over(count, signals.MOST_COMPARED)

    def prepare(self, background: str) -> Iterator[Progress]:
        """Make, or fetch, what every epoch is compared with: the null, and what the base does without the adapter."""
        yield from self._subject.data.fill(background)
        yield from self._nulls.make()
        with self._subject.adapter.disabled():
            self._retrieved_off = self._retrieve()
            self._losses_off = self._losses()

    def epoch(self, epoch: int, folder: Path, base_folder: Path) -> Iterator[Event]:
        """Draw an epoch's previews into its folder and check them; `copycheck.json` is kept beside them.

        Args:
            epoch: Which; 0 is the base.
            folder: The epoch's.
            base_folder: Epoch 0's, which was drawn and checked before.
        """
        watch = SamplerWatch(self._base)
        yield from draw_epoch(self._base, self._request, epoch, folder, watch)
        start = time.monotonic()
        found = self._signals(folder, base_folder, watch.guidance_norms) if epoch > 0 else []
        check = self.compare(folder, found, watch.guidance_norms)
        yield checked(epoch, check, time.monotonic() - start)

    def compare(self, folder: Path, found: Sequence[Signal], norms: Sequence[float] = ()) -> EpochCheck:
        """Check previews that lie in a folder; `copycheck.json` is kept beside them.

        Args:
            folder: An epoch's.
            found: What else was measured.
            norms: Guidance norms, one per preview, or none at all.
        """
        assert self._nulls.scores is not None, "prepare comes first"
        check = check_previews(self._request, folder, self._gallery, self._nulls.scores, found, self._arbiters, norms)
        check.write(folder)
        return check

    def registered_similarity(self, folder: Path) -> Signal:
        """The sign of warped copies, for previews that lie in a folder."""
        images = [image for of_prompt in self._images(folder) for image in of_prompt]
        best = registered(images, list(self._gallery.images.values())).amax(dim=1)
        assert self._nulls.registered is not None, "prepare comes first"
        return signals.registered_similarity(best, self._nulls.registered)

    def _retrieve(self) -> list[bool]:
        return signals.retrieve(self._subject.data, self._probed, self._subject.seed)

    def _losses(self) -> Tensor:
        return image_losses(self._subject.data, self._compared, self._subject.seed)

    def _signals(self, folder: Path, base_folder: Path, norms: Sequence[float]) -> list[Signal]:
        base_check = EpochCheck.read(base_folder)
        assert base_check is not None, "epoch 0 comes first"
        base_norms = [m.guidance_norm for m in base_check.previews if m.guidance_norm is not None]
        on, off = self._by_prompt(norms), self._by_prompt(base_norms)
        cut = self._request.num_captions
        measured = self._subject.validation
        validation = None
        if measured is not None:
            assert measured.losses_on is not None and measured.losses_off is not None, "the epoch was measured before"
            validation = (measured.losses_on, measured.losses_off)
        return [
            signals.self_retrieval(self._retrieve(), self._retrieved_off),
            signals.train_validation_gap((self._losses(), self._losses_off), validation),
            signals.seed_collapse(self._images(folder), self._images(base_folder)),
            signals.guidance_norm((on[:cut], off[:cut]), (on[cut:], off[cut:])),
            self.registered_similarity(folder),
        ]

    def _by_prompt(self, values: Sequence[T]) -> list[list[T]]:
        """A value per preview, by prompt; no prompt at all where there are no values."""
        num_seeds = len(self._request.seeds)
        return [list(values[first : first + num_seeds]) for first in range(0, len(values), num_seeds)]

    def _images(self, folder: Path) -> list[list[Image.Image]]:
        files = [folder / "previews" / name for name in self._request.file_names()]
        return self._by_prompt([reduced(Image.open(file)) for file in files])


def checked(epoch: int, check: EpochCheck, seconds: float) -> CopyChecked:
    """The event that tells of a check."""
    best = check.most_similar()
    return CopyChecked(
        epoch=epoch,
        verdict=check.verdict,
        reason=check.reason,
        share=check.share,
        share_lower_bound=check.share_lower_bound,
        false_alarm_rate=check.false_alarm_rate,
        most_similar=(best.nearest, best.file),
        similarity=best.similarity,
        seconds=seconds,
    )
