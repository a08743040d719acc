"""Previews as images: a grid of prompts by epochs, and each preview beside its nearest training image.

The macros `epoch_grids` and `pairs` of `templates/parts.html` write what is gathered here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageChops, ImageOps, ImageStat

from sdlora.copycheck.verdict import Match
from sdlora.report.copy_section import Checks
from sdlora.report.html import Attributes, epoch_name
from sdlora.report.images import Album, read_image

_TONES = ("copying", "watch", "clean")
_LAYOUT_PX = 16  # enough to tell left from right
_HEADINGS = {
    "training": "Training captions: some similarity is expected",
    "novel": "New prompts: a copy here is serious",
}


class Tile(NamedTuple):
    """A preview in a grid, where it leads, and how serious its match is; see `tone`."""

    href: str
    image: Attributes
    tone: str


class Grid(NamedTuple):
    """The previews of one kind of prompt."""

    heading: str
    heads: Sequence[tuple[str, str]]  # what each column shows, and a detail that may be empty
    # Every prompt with its tiles: a row for each seed, a column for each epoch or job.
    prompts: Sequence[tuple[str, Sequence[Sequence[Tile | None]]]]


class Pair(NamedTuple):
    """A preview beside its nearest training image, which is also laid over it."""

    id: str  # of the element
    match: Match
    tone: str
    preview: Attributes
    overlay: Attributes
    training: Attributes
    is_mirrored: bool  # whether the training image is more like the preview when it is mirrored


def tone(match: Match) -> str:
    """How serious a match is: "copying" for one that no training caption asked for, else "watch"; or "clean"."""
    if not match.significant:
        return "clean"
    return "watch" if match.kind == "training" else "copying"


class Comparisons:
    """The images of all epochs that were checked.

    Args:
        checks: By epoch, at least one.
        epochs: The folder that holds one folder for each epoch.
        gallery: The training images by name, as they are trained.
    """

    def __init__(self, checks: Checks, epochs: Path, gallery: Mapping[str, Image.Image], album: Album) -> None:
        self._checks = dict(sorted(checks.items()))
        self._epochs, self._gallery, self._album = epochs, gallery, album

    def grids(self) -> list[Grid]:
        """All previews, a column for each epoch; each leads to its comparison."""
        latest = self._checks[max(self._checks)].previews
        heads = [(epoch_name(epoch), "") for epoch in self._checks]
        grids = []
        for kind, heading in _HEADINGS.items():
            prompts = dict.fromkeys(match.prompt for match in latest if match.kind == kind)
            if prompts:
                grids.append(Grid(heading, heads, [(prompt, self._rows(kind, prompt)) for prompt in prompts]))
        return grids

    def _rows(self, kind: str, prompt: str) -> list[list[Tile | None]]:
        tiles: dict[tuple[int, int], Tile] = {}
        for epoch, check in self._checks.items():
            for index, match in enumerate(check.previews):
                if (match.kind, match.prompt) == (kind, prompt):
                    image = self._preview(epoch, match, f"{prompt}, {epoch_name(epoch)}, seed {match.seed}")
                    tiles[match.seed, epoch] = Tile(f"#pair-{epoch}-{index}", image, tone(match))
        return [[tiles.get((seed, epoch)) for epoch in self._checks] for seed in sorted({seed for seed, _ in tiles})]

    def pairs(self, epoch: int) -> list[Pair]:
        """Every preview of an epoch beside its nearest training image, the most serious matches first."""
        pairs = [self._pair(epoch, index, match) for index, match in enumerate(self._checks[epoch].previews)]
        return sorted(pairs, key=lambda p: (_TONES.index(p.tone), p.match.p_value, -p.match.similarity))

    def _pair(self, epoch: int, index: int, match: Match) -> Pair:
        def training(alt: str) -> Attributes:
            return self._album.show(f"training {match.nearest}", lambda: self._gallery[match.nearest], alt)

        preview = self._preview(epoch, match, f"preview: {match.prompt}")
        overlay = training(f"{match.nearest}, laid over the preview")
        beside = training(f"training image {match.nearest}")
        is_mirrored = match.significant and self._is_mirrored(epoch, match)
        return Pair(f"pair-{epoch}-{index}", match, tone(match), preview, overlay, beside, is_mirrored)

    def _is_mirrored(self, epoch: int, match: Match) -> bool:
        preview, training = read_image(self._epochs / str(epoch) / match.file), self._gallery[match.nearest]
        return _difference(preview, ImageOps.mirror(training)) < _difference(preview, training)

    def _preview(self, epoch: int, match: Match, alt: str) -> Attributes:
        file = self._epochs / str(epoch) / match.file
        return self._album.show(str(file), lambda: read_image(file), alt)


def _difference(first: Image.Image, second: Image.Image) -> float:
    small = [image.convert("L").resize((_LAYOUT_PX, _LAYOUT_PX), Image.Resampling.BOX) for image in (first, second)]
    return ImageStat.Stat(ImageChops.difference(*small)).sum[0]
