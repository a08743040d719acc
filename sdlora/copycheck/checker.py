"""The copy check as a whole: draws an epoch's previews, compares them and measures the other signals.

Called by `run` at the end of every epoch, and for a finished LoRA file.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from pathlib import Path
from statistics import median_low
from typing import TypeVar

from PIL import Image
from torch import Tensor

from sdlora.copycheck import signals
from sdlora.copycheck.decoded import as_drawn
from sdlora.copycheck.embedders import Embedders
from sdlora.copycheck.features import Features, feature_block
from sdlora.copycheck.parts import PartFinder, parts_signal
from sdlora.copycheck.scale import SAME_PICTURE, Gallery, Scale, evenly_spaced, reduced, set_scale
from sdlora.copycheck.signals import MAX_COMPARED, MAX_PROBED, Signal
from sdlora.copycheck.similarity import hp_ms, registered_correlation
from sdlora.copycheck.sources import advice, copied_images
from sdlora.copycheck.verdict import FULL, EpochCheck, fidelity, judge, judge_base, match_previews
from sdlora.events import CopyChecked, Event, Progress
from sdlora.lora.inject import Adapter
from sdlora.previews.sampler import PreviewRequest, SamplerWatch, draw_epoch, draw_files
from sdlora.training.data import TrainingData
from sdlora.training.validation import Validation, image_losses

T = TypeVar("T")


@dataclass(eq=False)
class Checker:
    """Draws previews of an adapter and decides whether they are copies; `prepare` comes first.

    Attributes:
        adapter: Attached to its base model.
        data: The training images with their captions unchanged, the same at every exposure; its cache holds their
            scale.
        validation: Measures the validation images; None if there are none.
        request: What to draw.
        gallery: The images that may have been copied, and validation images.
        finds_parts: Whether parts of the images are looked for, which takes OpenCV.
        network_identity: A hash of the base model's network, for cache keys.
    """

    adapter: Adapter
    data: TrainingData
    validation: Validation | None
    seed: int
    request: PreviewRequest
    gallery: Gallery
    embedders: Embedders
    finds_parts: bool = False
    network_identity: str = ""
    _twins: dict[str, list[str]] = field(default_factory=dict, init=False)

    def prepare(self, background: str) -> Iterator[Progress]:
        """Compute, or read from the cache, what epochs are compared with: the scale and the base model's signals."""
        yield from self.data.fill(background)
        self._drawn, copy_of = yield from as_drawn(self.data, self.gallery)
        self._embedders = yield from self._with_features()
        self._scale = yield from set_scale(self.data, self._drawn, self._embedders, copy_of)
        self._parts = PartFinder(self.gallery.images) if self.finds_parts else None
        self._knows_base = False
        with self.adapter.disabled():
            self._retrieved_off, self._losses_off = self._retrieved(), self._losses()

    def _with_features(self) -> Generator[Progress, None, Embedders]:
        """The networks that compare, with that of the base model if it is a UNet."""
        base, block = self.data.cache.base, feature_block(self.data.cache.base.network)
        if block is None:
            return self.embedders
        like = self.data.dataset.examples[0]
        features = Features(base, block, self.network_identity, self.adapter.disabled, like)
        yield from features.fit(list(self._drawn.images.values()), self.data.cache)
        return replace(self.embedders, features=features)

    def epoch(self, epoch: int, folder: Path, base_folder: Path, *, is_trained_here: bool = True) -> Iterator[Event]:
        """Draw an epoch's previews into its folder, check them and write `copycheck.json` beside them.

        Where some previews are significant, but too few to call it copying, more are drawn at once.

        Args:
            base_folder: That of epoch 0, the base model, which was drawn and checked before.
            is_trained_here: Whether the images were trained on as often as their repeats say, epoch after epoch.
        """
        base = self.data.cache.base
        watch = SamplerWatch(base)
        yield from draw_epoch(base, self.request, epoch, folder, watch)
        start = time.monotonic()
        if epoch == 0:
            check = self._check_base(folder, watch.guidance_norms)
            check.write(folder)
        else:
            if not self._knows_base:  # the run was resumed
                self._check_base(base_folder)
            measured = self._signals(folder, base_folder, watch.guidance_norms)
            check = self.compare(folder, measured, watch.guidance_norms)
            undecided = check.verdict != "copying" and check.num_matches > 0
            if undecided and len(check.previews) < FULL:
                more = self.request.more(FULL)
                yield from draw_files(base, more, folder, "more previews")
                further, _ = match_previews(*self._compared(more, folder))
                check = judge([*check.previews, *further], measured)
            check = self._with_parts(self._with_images(check, epoch if is_trained_here else None), folder)
            check.write(folder)
        best = check.most_similar()
        yield CopyChecked(
            epoch=epoch,
            verdict=check.verdict,
            reason=check.reason,
            share=check.share,
            share_lower_bound=check.share_lower_bound,
            false_alarm_rate=check.false_alarm_rate,
            most_similar=(best.nearest, best.file),
            similarity=best.similarity,
            seconds=time.monotonic() - start,
        )

    def _check_base(self, folder: Path, norms: Sequence[float] = ()) -> EpochCheck:
        """The check of the base model, which has copied nothing: where it seems to, the scale is corrected."""
        matches, found = match_previews(*self._compared(self.request, folder), norms)
        self._scale = self._scale.with_fresh(found[[match.significant for match in matches]])
        self._knows_base = True
        return judge_base(matches)

    def compare(self, folder: Path, measured: Sequence[Signal], norms: Sequence[float] = ()) -> EpochCheck:
        """Check the previews in an epoch's folder and write `copycheck.json` there, with the other signals.

        Args:
            norms: Guidance norms, one per preview, or none at all.
        """
        matches, _ = match_previews(*self._compared(self.request, folder), norms)
        check = judge(matches, measured)
        check.write(folder)
        return check

    def _with_images(self, check: EpochCheck, epoch: int | None) -> EpochCheck:
        """The same with the training images that its previews match, and what to do about them."""
        examples = self.data.dataset.examples
        exposures = {} if epoch is None else {example.name: example.repeats * epoch for example in examples}
        nearest = [(match.nearest, match.kind == "novel") for match in check.previews if match.significant]
        images = copied_images(nearest, self._find_twins, exposures)
        usual = median_low(exposures.values()) if exposures else None
        return replace(check, copied_images=images, advice=advice(images, usual))

    def _with_parts(self, check: EpochCheck, folder: Path) -> EpochCheck:
        """The same with the parts of training images that its previews show, where they are looked for."""
        if self._parts is None:
            return check
        found = [self._parts.find(reduced(Image.open(folder / match.file))) for match in check.previews]
        previews = [replace(match, part=part) for match, part in zip(check.previews, found, strict=True)]
        signal = parts_signal(found)
        return replace(check, previews=previews, signals={**check.signals, signal.name: signal.to_json()})

    def _find_twins(self, name: str) -> list[str]:
        """The other training images that show the same picture, remembered for the next epoch."""
        if name not in self._twins:
            images = self.gallery.images
            similarity = hp_ms([images[name]], list(images.values()))[0].tolist()
            same = [other for other, found in zip(images, similarity, strict=True) if found >= SAME_PICTURE]
            self._twins[name] = [other for other in same if other != name]
        return self._twins[name]

    def _compared(
        self, request: PreviewRequest, folder: Path
    ) -> tuple[PreviewRequest, Path, Gallery, Scale, Embedders]:
        return request, folder, self._drawn, self._scale, self._embedders

    def registered_similarity(self, folder: Path) -> Signal:
        """The signal of warped copies, for the previews in an epoch's folder."""
        images = [image for of_prompt in self._images(folder) for image in of_prompt]
        best = registered_correlation(images, list(self._drawn.images.values())).amax(dim=1)
        return signals.registered_similarity(best, self._scale.registered)

    def _retrieved(self) -> list[bool]:
        return signals.retrieve(self.data, evenly_spaced(len(self.data.dataset.examples), MAX_PROBED), self.seed)

    def _losses(self) -> Tensor:
        return image_losses(self.data, evenly_spaced(len(self.data.dataset.examples), MAX_COMPARED), self.seed)

    def _signals(self, folder: Path, base_folder: Path, norms: Sequence[float]) -> list[Signal]:
        base_check = EpochCheck.read(base_folder)
        assert base_check is not None, "check epoch 0 first"
        base_norms = [m.guidance_norm for m in base_check.previews if m.guidance_norm is not None]
        on, off = self._by_prompt(norms), self._by_prompt(base_norms)
        cut = self.request.num_captions
        validation = None
        if (measured := self.validation) is not None:
            assert measured.losses_on is not None and measured.losses_off is not None, "measure the epoch first"
            validation = (measured.losses_on, measured.losses_off)
        dinov2 = self.embedders.dinov2
        images, base_images = self._images(folder), self._images(base_folder)
        return [
            signals.self_retrieval(self._retrieved(), self._retrieved_off),
            signals.train_validation_gap((self._losses(), self._losses_off), validation),
            signals.seed_collapse(images, base_images),
            signals.guidance_norm((on[:cut], off[:cut]), (on[cut:], off[cut:])),
            self.registered_similarity(folder),
            signals.preview_change(images, base_images),
            *([fidelity(dinov2, self.request, folder, self.gallery)] if dinov2 is not None else []),
        ]

    def _by_prompt(self, values: Sequence[T]) -> list[list[T]]:
        """One value per preview, grouped by prompt; an empty list for no values."""
        if not values:
            return []
        ends = list(accumulate(self.request.num_seeds()))
        return [list(values[first:end]) for first, end in pairwise([0, *ends])]

    def _images(self, folder: Path) -> list[list[Image.Image]]:
        files = [folder / "previews" / name for name in self.request.file_names()]
        return self._by_prompt([reduced(Image.open(file)) for file in files])
