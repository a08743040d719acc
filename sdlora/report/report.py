"""The page a person reads during and after a run: one self-contained HTML file.

Everything shown comes from the run's folder; text is escaped, images are embedded.
"""

from __future__ import annotations

import base64
import html
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from sdlora.common.files import write_text
from sdlora.common.metrics import LossSmoother, read_metrics
from sdlora.copycheck.verdict import EpochCheck
from sdlora.diffusion.bands import NUM_BANDS, band_names
from sdlora.diffusion.timesteps import HIGH_NOISE, NUM_TIMESTEPS
from sdlora.events import EpochDone, StepDone
from sdlora.report.charts import COLORS, Line, bar_chart, line_chart
from sdlora.report.comparisons import Comparisons
from sdlora.report.copy_section import Checks, copy_figures, epochs_at_a_glance, verdict_banner, verdict_chip
from sdlora.report.html import epoch_name, figure, frame, table
from sdlora.report.images import Album

NUM_BINS = 20


@dataclass(frozen=True)
class Report:
    """What the page is made of.

    Attributes:
        title: The run's name.
        sentences: What a person should know first, one paragraph each.
        epochs: The folder that holds one folder for each epoch.
        sheet: The contact sheet, shown where no epoch was checked for copies; left out if it does not exist.
        metrics: `metrics.jsonl`, from which every number of the training comes.
        config: `config.toml`, shown as it is.
        gallery: The training images by name, as cropped for training.
        kept: The epoch whose file is the run's; None while that is open.
    """

    title: str
    sentences: Sequence[str]
    epochs: Path
    sheet: Path
    metrics: Path
    config: Path
    gallery: Mapping[str, Image.Image]
    kept: int | None = None


def write_report(target: Path, report: Report) -> None:
    """Write the page.

    Args:
        target: The HTML file.
        report: What is shown.
    """
    metrics = read_metrics(report.metrics)
    steps, epochs = metrics.steps, metrics.epochs
    # Only epochs of the metrics: a run resumed from an earlier checkpoint leaves newer folders behind.
    found = {event.epoch: EpochCheck.read(report.epochs / str(event.epoch)) for event in epochs}
    checks = {epoch: check for epoch, check in found.items() if check is not None}
    album = Album()
    parts = [f"<p>{html.escape(sentence)}</p>" for sentence in report.sentences]
    if checks:
        parts.insert(0, verdict_banner(checks, report.kept))
        parts += [epochs_at_a_glance(checks, epochs, steps, report.kept), *_copy_check(checks, report, album)]
    else:
        parts += ["<p class='quiet'>No preview was compared with the training images.</p>", _sheet(report.sheet)]
    if steps:
        parts += ["<h2>Loss</h2><div class='charts'>", _step_figure(steps), *_band_figures(epochs), "</div>"]
        parts += ["<h2>Where the exposures went</h2>", _coverage(exposed_timesteps(steps), report.gallery, album)]
    parts += ["<h2>The same numbers</h2>", _epoch_table(epochs), *_band_tables(epochs)]
    parts += ["<h2>Settings</h2>", f"<pre>{html.escape(report.config.read_text(encoding='utf-8'))}</pre>"]
    write_text(target, frame(report.title, parts))


def _sheet(sheet: Path) -> str:
    if not sheet.exists():
        return ""
    data = base64.b64encode(sheet.read_bytes()).decode("ascii")
    return f"<h2>Previews</h2><img alt='contact sheet: previews by epoch' src='data:image/png;base64,{data}'>"


def _copy_check(checks: Checks, report: Report, album: Album) -> list[str]:
    shown = Comparisons(checks, report.epochs, report.gallery, album)
    latest = max(checks)
    earlier = [
        f"<details><summary>{epoch_name(epoch).capitalize()} {verdict_chip(checks[epoch])}</summary>"
        f"{_reason(checks[epoch])}{shown.pairs(epoch)}</details>"
        for epoch in sorted(checks, reverse=True)
        if epoch != latest
    ]
    return [
        "<h2>Previews, epoch by epoch</h2>",
        "<p>Choose an image to see it beside the training image that it is most like.</p>",
        shown.grid(),
        f"<h2>Beside the nearest training image: {epoch_name(latest)} {verdict_chip(checks[latest])}</h2>",
        _reason(checks[latest]),
        "<p>Move the slider to lay the training image over the preview. A copy may be mirrored, or only a part. "
        "What this check cannot find is a subject cut out and set into another image: have a look yourself.</p>",
        "<p class='quiet'>Similarity compares details, and layout where it is light and dark. In both 1 is a copy, and "
        "either can make a match; two unrelated images have about half their layout in common.</p>",
        shown.pairs(latest),
        *earlier,
        "<h2>Signs of copying</h2>",
        copy_figures(checks),
    ]


def _reason(check: EpochCheck) -> str:
    return f"<p>{html.escape(check.reason)}</p>"


# --- Where the exposures went -----------------------------------------------------------------------------------------


def exposed_timesteps(steps: Sequence[StepDone]) -> dict[str, list[int]]:
    """Every image's timesteps in the order of its exposures, by name."""
    exposed: dict[str, list[int]] = {}
    for event in steps:
        for name, timestep in zip(event.examples, event.timesteps, strict=True):
            exposed.setdefault(name, []).append(timestep)
    return dict(sorted(exposed.items()))


def largest_gap(timesteps: Sequence[int]) -> tuple[int, int]:
    """The widest stretch between two neighbours, the edges 0 and 999 counting as visited."""
    places = sorted([0, *timesteps, NUM_TIMESTEPS - 1])
    return max(itertools.pairwise(places), key=lambda pair: pair[1] - pair[0])


def _coverage(exposed: Mapping[str, Sequence[int]], gallery: Mapping[str, Image.Image], album: Album) -> str:
    gaps = {name: largest_gap(timesteps) for name, timesteps in exposed.items()}
    name = max(gaps, key=lambda image: gaps[image][1] - gaps[image][0])
    unseen = sum(max(timesteps) < HIGH_NOISE for timesteps in exposed.values())
    everything = [timestep for timesteps in exposed.values() for timestep in timesteps]
    first, last = gaps[name]
    return (
        "<div class='charts'>"
        + "\n".join(
            [
                figure(
                    "All images",
                    _histogram(everything),
                    f"Each bar counts the exposures to {NUM_TIMESTEPS // NUM_BINS} neighbouring noise levels: details "
                    "are learned on the left, the composition on the right. "
                    f"{unseen} of {len(exposed)} images never saw a timestep of {HIGH_NOISE} or more.",
                ),
                figure(
                    f"Least covered: {name}",
                    _histogram(exposed[name]),
                    f"Of all images, this one has the widest stretch without an exposure: timesteps {first} to {last}, "
                    f"after {len(exposed[name])} exposures.",
                    album.show(f"training {name}", lambda: gallery[name], name),
                ),
            ]
        )
        + "</div>"
    )


def _histogram(timesteps: Sequence[int]) -> str:
    counts = [0] * NUM_BINS
    for timestep in timesteps:
        counts[timestep * NUM_BINS // NUM_TIMESTEPS] += 1
    marks = list(range(0, NUM_TIMESTEPS + 1, NUM_TIMESTEPS // NUM_BANDS))
    return bar_chart(counts, marks, x_name="timestep (more noise to the right)", y_name="visits")


# --- Losses --------------------------------------------------------------------------------------------------------


def _step_figure(steps: Sequence[StepDone]) -> str:
    losses = [event.loss for event in steps]
    lines = [Line("step", losses, "#767676", width=0.7), Line("mean", list(map(LossSmoother().add, losses)), COLORS[1])]
    chart = line_chart(lines, [event.step for event in steps], x_name="step", y_name="training loss")
    return figure(
        "Training, step by step",
        chart,
        "The loss of each step and its running mean; it jumps, because some noise levels are harder than others.",
    )


class _Bands(NamedTuple):
    """A loss by bands of timesteps: where it stands in an event, and what is written beside its chart and table."""

    of: Callable[[EpochDone], Sequence[float | None] | None]
    title: str
    y_name: str
    sentence: str
    table_title: str
    is_change: bool = False


_BANDS = (
    _Bands(
        lambda event: event.train_bands,
        "Training, by noise level",
        "training loss",
        "The loss of the images that are trained, from little noise (timesteps 0-199) to the most (800-999).",
        "Training loss by timesteps",
    ),
    _Bands(
        lambda event: event.validation_bands,
        "Validation images, by noise level",
        "validation loss",
        "The loss of images that are never trained on: where it rises again, the LoRA begins to learn by heart.",
        "Validation loss by timesteps",
    ),
    _Bands(
        lambda event: event.validation_change,
        "What the LoRA changes on them",
        "adapter on minus off",
        "The same with the adapter on minus off: below 0 the LoRA is better than the base, above 0 it is worse.",
        "Validation loss, adapter on minus off",
        is_change=True,
    ),
)


def _by_epoch(bands: _Bands, epochs: Sequence[EpochDone]) -> dict[int, Sequence[float | None]]:
    return {event.epoch: found for event in epochs if (found := bands.of(event)) is not None}


def _band_figures(epochs: Sequence[EpochDone]) -> list[str]:
    figures = []
    for bands in _BANDS:
        rows = _by_epoch(bands, epochs)
        lines = [Line(name, [row[b] for row in rows.values()], COLORS[b]) for b, name in enumerate(band_names())]
        values = [value for line in lines for value in line.values if value is not None]
        # A weighting may take a band's only exposure to exactly 0, which no axis of ratios holds.
        log = not bands.is_change and min(values, default=0.0) > 0
        name = f"{bands.y_name} (logarithmic)" if log else bands.y_name
        chart = line_chart(lines, list(rows), x_name="epoch", y_name=name, log=log)
        if chart:
            figures.append(figure(bands.title, chart, bands.sentence))
    return figures


def _band_tables(epochs: Sequence[EpochDone]) -> list[str]:
    return [
        table(
            bands.table_title,
            ["epoch", *band_names()],
            [[_epoch(epoch), *map(_number, row)] for epoch, row in rows.items()],
        )
        for bands in _BANDS
        if (rows := _by_epoch(bands, epochs))
    ]


def _epoch_table(epochs: Sequence[EpochDone]) -> str:
    head = ["epoch", "training loss", "validation loss", "seconds"]
    rows = [
        [_epoch(event.epoch), _number(event.train_loss), _number(event.validation_loss), f"{event.seconds:.1f}"]
        for event in epochs
    ]
    return table("All timesteps together", head, rows)


# --- Parts of the page ---------------------------------------------------------------------------------------------


def _epoch(epoch: int) -> str:
    return str(epoch or "base")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.5f}"
