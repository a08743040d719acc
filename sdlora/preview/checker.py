"""Previews drawn, compared and measured together: what happens at the end of an epoch, and to a finished file.

Floor 6.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from sdlora.data.cache import Cache
from sdlora.events import CopyChecked, Event, Progress
from sdlora.lora.inject import Adapter
from sdlora.models.base import BaseModel
from sdlora.preview.arbiter import Arbiters
from sdlora.preview.copycheck import EpochCheck, check_previews
from sdlora.preview.nulls import Gallery, NullMaker
from sdlora.preview.sampler import PreviewRequest, draw_epoch


class Checker:
    """Draws previews and says whether they are copies.

    Args:
        base: The model, with the adapter in it.
        adapter: What is checked.
        request: What to draw.
        gallery: The pictures that may have been copied, and others of their kind.
        cache: Where the null is kept.
        identity: A hash of the frozen UNet.
        arbiters: Networks that are asked as well.
    """

    def __init__(
        self,
        base: BaseModel,
        adapter: Adapter,
        request: PreviewRequest,
        gallery: Gallery,
        cache: Cache,
        identity: str,
        arbiters: Arbiters,
    ) -> None:
        self._base, self._adapter = base, adapter
        self.request, self.gallery = request, gallery
        self._arbiters = arbiters
        self._nulls = NullMaker(base, adapter, request, gallery, cache, identity, arbiters)

    def prepare(self) -> Iterator[Progress]:
        """Make, or fetch, what every epoch is compared with."""
        yield from self._nulls.make()

    def epoch(self, epoch: int, folder: Path) -> Iterator[Event]:
        """Draw an epoch's previews into its folder and check them; `copycheck.json` is kept beside them."""
        yield from draw_epoch(self._base, self.request, epoch, folder)
        start = time.monotonic()
        assert self._nulls.scores is not None, "prepare comes first"
        check = check_previews(self.request, folder, self.gallery, self._nulls.scores, (), self._arbiters)
        check.write(folder)
        yield checked(epoch, check, time.monotonic() - start)


def checked(epoch: int, check: EpochCheck, seconds: float) -> CopyChecked:
    """The event that tells of a check."""
    best = check.most_alike()
    return CopyChecked(
        epoch=epoch,
        verdict=check.verdict,
        reason=check.reason,
        share=check.share,
        share_lower_bound=check.share_lower_bound,
        false_alarm_rate=check.false_alarm_rate,
        most_alike=(best.nearest, best.file),
        hp_ms=best.hp_ms,
        seconds=seconds,
    )
