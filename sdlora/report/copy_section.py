"""What a page says of copying: the epoch that is judged, how every sign developed, and the previews as images.

The words of the verdicts are in `templates/parts.html`, whose macros `epoch_grids` and `pairs` show the images.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageChops, ImageDraw, ImageOps, ImageStat

from sdlora.common.run_files import Metrics
from sdlora.common.text import format_range
from sdlora.copycheck.parts import Outline
from sdlora.copycheck.scale import ALPHA
from sdlora.copycheck.verdict import CONFIDENCE, EpochCheck, Match
from sdlora.report.charts import COLORS, GREY, Line, line_chart
from sdlora.report.html import Album, Attributes, Figure, epoch_name, read_image

Checks = Mapping[int, EpochCheck]

VERDICT_COLORS = {"clean": "#1b6e3c", "watch": "#7a4b00", "copying": "#a3122b"}
"""The page's own colours of the verdicts, for charts."""

_SIGNALS = {
    "self_retrieval": ("Captions lead back to their own images", "self-retrieval"),
    "train_heldout_gap": ("Better on training than on validation images", "training-validation gap"),
    "seed_collapse": ("Similarity between seeds", "seed collapse"),
    "guidance_norm": ("Strength of the prompt's guidance", "guidance norm"),
    "concept_fidelity": ("Concept fidelity, as DINOv2 sees it", "concept fidelity"),
    "registered_likeness": ("Similarity after alignment", "aligned similarity"),
    "parts": ("Previews that show a part of an image", "share of previews"),
    "preview_change": ("What is left of the base model's previews", "similarity"),
}
_KINDS = (("training", "captions", COLORS[3]), ("novel", "new", COLORS[1]))
_TONES = ("copying", "watch", "clean")
_LAYOUT_PX = 16  # enough to tell left from right
_HEADINGS = {
    "training": "Training captions: some similarity is expected",
    "novel": "New prompts: a copy here is serious",
}


class EpochRow(NamedTuple):
    """An epoch, of which 0 is the base model, in a row of a table."""

    epoch: int
    check: EpochCheck | None
    exposures: str  # of each image by then: a number or a range
    validation_loss: float | None
    is_kept: bool  # whether its file is the run's


def judged_epoch(checks: Checks, kept: int | None) -> int:
    """The epoch whose verdict stands on top: the one that is kept, or the latest while that is open."""
    return kept if kept in checks and kept is not None else max(checks)


def epoch_rows(checks: Checks, metrics: Metrics, kept: int | None) -> list[EpochRow]:
    """A row for every epoch; `kept` is the one whose file is the run's."""
    names = {name for event in metrics.steps for name in event.examples}
    rows = []
    for done in metrics.epochs:
        counts = Counter(name for event in metrics.steps if event.epoch <= done.epoch for name in event.examples)
        exposures = format_range(min((counts[name] for name in names), default=0), max(counts.values(), default=0))
        check = checks.get(done.epoch)
        rows.append(EpochRow(done.epoch, check, exposures, done.validation_loss, done.epoch == kept))
    return rows


def copy_figures(checks: Checks) -> list[Figure]:
    """Charts by epoch: matches, similarity, and every signal with its meaning."""
    epochs = sorted(checks)
    found = [checks[epoch] for epoch in epochs]
    matches = [
        Line("at least", [check.share_lower_bound for check in found], GREY),
        Line("found", [check.share for check in found], COLORS[1]),
    ]
    signals = dict.fromkeys(name for check in found for name in check.signals)
    return [
        _figure(
            "Previews that match", matches, epochs, "share of previews",
            f"The share of previews that match a training image, and its lower bound with {CONFIDENCE:.1%} confidence. "
            f"An epoch is called copying where the bound is above {ALPHA:.0%}.",
        ),
        _figure(
            "Most similar preview", _similarity(found, best=True), epochs, "similarity (1 = copy)",
            "The preview most similar to a training image, for training captions and for new prompts.",
        ),
        _figure(
            "Mean over all previews", _similarity(found, best=False), epochs, "mean similarity (1 = copy)",
            "Similarity grows with learning; where it jumps for new prompts, copying begins.",
        ),
        *(_signal_figure(name, found, epochs) for name in signals),
    ]  # fmt: skip


def _similarity(found: Sequence[EpochCheck], *, best: bool) -> list[Line]:
    def of(previews: Sequence[Match], kind: str) -> float | None:
        values = [match.similarity for match in previews if match.kind == kind]
        return (max(values) if best else sum(values) / len(values)) if values else None

    return [Line(label, [of(check.previews, kind) for check in found], color) for kind, label, color in _KINDS]


def _signal_figure(name: str, found: Sequence[EpochCheck], epochs: Sequence[int]) -> Figure:
    values = [check.signals[name]["value"] if name in check.signals else None for check in found]
    latest = next(check.signals[name] for check in reversed(found) if name in check.signals)
    label = "" if latest["value"] is None else f"{latest['value']:.3g}"
    note = latest["meaning"]
    if latest["p_value"] is not None:
        note += f" p-value {latest['p_value']:.2g}: {'' if latest['outside'] else 'not '}significant."
    title, y_name = _SIGNALS.get(name, (name.replace("_", " "), name.replace("_", " ")))
    return _figure(title, [Line(label, values, COLORS[2])], epochs, y_name, note)


def _figure(title: str, lines: Sequence[Line], epochs: Sequence[int], y_name: str, note: str) -> Figure:
    return Figure(title, line_chart(lines, epochs, x_name="epoch", y_name=y_name), note)


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
    part: tuple[Attributes, Attributes] | None  # preview and training image with the part that they share outlined


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
        return Pair(
            f"pair-{epoch}-{index}", match, tone(match), preview, overlay, beside, is_mirrored, self._part(epoch, match)
        )

    def _part(self, epoch: int, match: Match) -> tuple[Attributes, Attributes] | None:
        part = match.part
        if part is None or part.name not in self._gallery:
            return None
        file = self._epochs / str(epoch) / match.file
        preview, training = part.preview, part.training
        return (
            self._album.show(f"part {file}", lambda: outlined(read_image(file), preview), "the part in the preview"),
            self._album.show(
                f"part {file} {part.name}", lambda: outlined(self._gallery[part.name], training), f"it in {part.name}"
            ),
        )

    def _is_mirrored(self, epoch: int, match: Match) -> bool:
        preview, training = read_image(self._epochs / str(epoch) / match.file), self._gallery[match.nearest]
        return _difference(preview, ImageOps.mirror(training)) < _difference(preview, training)

    def _preview(self, epoch: int, match: Match, alt: str) -> Attributes:
        file = self._epochs / str(epoch) / match.file
        return self._album.show(str(file), lambda: read_image(file), alt)


def outlined(image: Image.Image, outline: Outline) -> Image.Image:
    """A copy of an image with a polygon around a part of it."""
    shown = image.convert("RGB")
    corners = [(x * shown.width, y * shown.height) for x, y in outline]
    width = max(2, min(shown.size) // 100)
    ImageDraw.Draw(shown).line([*corners, corners[0]], fill=VERDICT_COLORS["copying"], width=width)
    return shown


def _difference(first: Image.Image, second: Image.Image) -> float:
    small = [image.convert("L").resize((_LAYOUT_PX, _LAYOUT_PX), Image.Resampling.BOX) for image in (first, second)]
    return ImageStat.Stat(ImageChops.difference(*small)).sum[0]
