"""The page a person reads during and after a run: one self-contained HTML file, with charts and tables of its losses.

Written from the run's folder by `templates/report.html`; images are embedded. The studio shows the same charts.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from markupsafe import Markup
from PIL import Image

from sdlora.common.files import write_text
from sdlora.common.run_files import LossSmoother, Metrics, read_metrics
from sdlora.copycheck.verdict import EpochCheck
from sdlora.diffusion.timesteps import HIGH_NOISE, NUM_BANDS, NUM_TIMESTEPS, band_names
from sdlora.events import EpochDone, StepDone
from sdlora.report.charts import COLORS, GREY, Line, bar_chart, line_chart
from sdlora.report.copy_section import Comparisons, copy_figures, epoch_rows, judged_epoch
from sdlora.report.further import further_grids
from sdlora.report.html import Album, Figure, Table, data_url, render

NUM_BINS = 20


def write_report(
    folder: Path, title: str, sentences: Sequence[str], gallery: Mapping[str, Image.Image], kept: int | None = None
) -> None:
    """Write a run's page, `report.html`, from the other files in its folder.

    Args:
        folder: The run's. The contact sheet is shown where no epoch was checked for copies.
        title: The run's name.
        sentences: What a person should know first, one paragraph each.
        gallery: The training images by name, as cropped for training.
        kept: The epoch whose file is the run's; None while that is open.
    """
    metrics, epochs, sheet = read_metrics(folder / "metrics.jsonl"), folder / "epochs", folder / "previews.png"
    # Only epochs of the metrics: a run resumed from an earlier checkpoint leaves newer folders behind.
    found = {event.epoch: EpochCheck.read(epochs / str(event.epoch)) for event in metrics.epochs}
    checks = {epoch: check for epoch, check in found.items() if check is not None}
    album = Album()
    values: dict[str, Any] = {
        "title": title,
        "sentences": sentences,
        "kept": kept,
        "latest": None,
        "coverage_figures": [],
        "sheet": data_url("png", sheet.read_bytes()) if sheet.exists() else "",
        "further_grids": further_grids(folder, checks, album, lambda file: quote(file.relative_to(folder).as_posix())),
        "tables": loss_tables(metrics.epochs),
        "config": (folder / "config.toml").read_text(encoding="utf-8"),
    }
    if checks:
        comparisons = Comparisons(checks, epochs, gallery, album)
        values["grids"] = comparisons.grids()
        values["latest"], *values["earlier_checks"] = (
            {"epoch": epoch, "check": checks[epoch], "pairs": comparisons.pairs(epoch)}
            for epoch in sorted(checks, reverse=True)
        )
        judged = judged_epoch(checks, kept)
        values["judged"] = {"epoch": judged, "check": checks[judged]}
        values["copy_figures"] = copy_figures(checks)
        values["glance_rows"] = epoch_rows(checks, metrics, kept)
    if metrics.steps:
        values["loss_figures"] = loss_figures(metrics)
        values["coverage_figures"] = coverage_figures(metrics.steps, gallery, album)
    write_text(folder / "report.html", render("report.html", **values))


class _Bands(NamedTuple):
    """A loss by bands of timesteps: where an event has it, and the words around its chart and its table."""

    of: Callable[[EpochDone], Sequence[float | None] | None]
    title: str
    y_name: str
    note: str
    table_title: str
    is_change: bool = False


_BANDS = (
    _Bands(
        lambda event: event.train_bands, "Training loss by timestep", "training loss",
        "From little noise (timesteps 0-199) to the most (800-999).", "Training loss by timesteps",
    ),
    _Bands(
        lambda event: event.validation_bands, "Validation loss by timestep", "validation loss",
        "Of images that are never trained on: where it rises again, the LoRA starts to memorize.",
        "Validation loss by timesteps",
    ),
    _Bands(
        lambda event: event.validation_change, "Effect of the LoRA on the validation loss", "with minus without",
        "The validation loss with the LoRA minus that of the base model: below 0 the LoRA is better, above 0 worse.",
        "Validation loss, with the LoRA minus without", is_change=True,
    ),
)  # fmt: skip


def _by_epoch(bands: _Bands, epochs: Sequence[EpochDone]) -> dict[int, Sequence[float | None]]:
    return {event.epoch: found for event in epochs if (found := bands.of(event)) is not None}


def loss_figures(metrics: Metrics) -> list[Figure]:
    """The training loss by step, of which there is at least one, then every loss by timestep and epoch."""
    losses = [event.loss for event in metrics.steps]
    means = list(map(LossSmoother().add, losses))
    lines = [Line("step", losses, GREY, width=0.7), Line("mean", means, COLORS[1])]
    chart = line_chart(lines, [event.step for event in metrics.steps], x_name="step", y_name="training loss")
    note = "The loss of each step and its moving average. It is noisy because some timesteps are harder than others."
    figures = [Figure("Training loss by step", chart, note)]
    for bands in _BANDS:
        rows = _by_epoch(bands, metrics.epochs)
        lines = [Line(name, [row[b] for row in rows.values()], COLORS[b]) for b, name in enumerate(band_names())]
        values = [value for line in lines for value in line.values if value is not None]
        # A weighting may take a band's only exposure to exactly 0, which no logarithmic axis holds.
        log = not bands.is_change and min(values, default=0.0) > 0
        name = f"{bands.y_name} (logarithmic)" if log else bands.y_name
        chart = line_chart(lines, list(rows), x_name="epoch", y_name=name, log=log)
        if chart:
            figures.append(Figure(bands.title, chart, bands.note))
    return figures


def loss_tables(epochs: Sequence[EpochDone]) -> list[Table]:
    """The losses of the epochs as numbers: of all timesteps together, then by band."""
    whole = [
        [str(event.epoch or "base"), _number(event.train_loss), _number(event.validation_loss), f"{event.seconds:.1f}"]
        for event in epochs
    ]
    tables = [Table("All timesteps", ["epoch", "training loss", "validation loss", "seconds"], whole)]
    for bands in _BANDS:
        rows = [[str(epoch or "base"), *map(_number, losses)] for epoch, losses in _by_epoch(bands, epochs).items()]
        if rows:
            tables.append(Table(bands.table_title, ["epoch", *band_names()], rows))
    return tables


def coverage_figures(steps: Sequence[StepDone], gallery: Mapping[str, Image.Image], album: Album) -> list[Figure]:
    """How often each range of timesteps was seen: of all images, and of the one with the widest gap."""
    exposed = exposed_timesteps(steps)
    gaps = {name: largest_gap(timesteps) for name, timesteps in exposed.items()}
    name = max(gaps, key=lambda image: gaps[image][1] - gaps[image][0])
    first, last = gaps[name]
    unseen = sum(max(timesteps) < HIGH_NOISE for timesteps in exposed.values())
    everything = [timestep for timesteps in exposed.values() for timestep in timesteps]
    return [
        Figure(
            "All images",
            timestep_chart(everything),
            f"Each bar counts the exposures in a range of {NUM_TIMESTEPS // NUM_BINS} timesteps: details are learned "
            f"on the left, the composition on the right. {unseen} of {len(exposed)} images had no exposure at "
            f"timestep {HIGH_NOISE} or above.",
        ),
        Figure(
            f"Least covered: {name}",
            timestep_chart(exposed[name]),
            f"This image has the widest gap without an exposure: timesteps {first} to {last}, after "
            f"{len(exposed[name])} exposures.",
            album.show(f"training {name}", lambda: gallery[name], name),
        ),
    ]


def exposed_timesteps(steps: Sequence[StepDone]) -> dict[str, list[int]]:
    """Every image's timesteps in the order of its exposures, by name."""
    exposed: dict[str, list[int]] = {}
    for event in steps:
        for name, timestep in zip(event.examples, event.timesteps, strict=True):
            exposed.setdefault(name, []).append(timestep)
    return dict(sorted(exposed.items()))


def largest_gap(timesteps: Sequence[int]) -> tuple[int, int]:
    """The widest gap between two neighbours, the edges 0 and 999 included."""
    places = sorted([0, *timesteps, NUM_TIMESTEPS - 1])
    return max(itertools.pairwise(places), key=lambda pair: pair[1] - pair[0])


def timestep_chart(timesteps: Sequence[int]) -> Markup:
    """A histogram of timesteps."""
    counts = [0] * NUM_BINS
    for timestep in timesteps:
        counts[timestep * NUM_BINS // NUM_TIMESTEPS] += 1
    marks = list(range(0, NUM_TIMESTEPS + 1, NUM_TIMESTEPS // NUM_BANDS))
    return bar_chart(counts, marks, x_name="timestep (more noise to the right)", y_name="exposures")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.5f}"
