"""The page a person reads during and after a run: one self-contained HTML file.

Written from the run's folder by `templates/report.html`; images are embedded.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from sdlora.common.files import write_text
from sdlora.common.metrics import read_metrics
from sdlora.copycheck.verdict import EpochCheck
from sdlora.report.comparisons import Comparisons
from sdlora.report.copy_section import Checks, copy_figures, epoch_rows, judged_epoch
from sdlora.report.html import render
from sdlora.report.images import Album
from sdlora.report.training_section import coverage_figures, loss_figures, loss_tables


@dataclass(frozen=True)
class Report:
    """What the page is made of.

    Attributes:
        title: The run's name.
        sentences: What a person should know first, one paragraph each.
        epochs: The folder that holds one folder for each epoch.
        sheet: The contact sheet, shown where no epoch was checked for copies; left out if it does not exist.
        metrics: `metrics.jsonl`, from which every figure of the training comes.
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
    # Only epochs of the metrics: a run resumed from an earlier checkpoint leaves newer folders behind.
    found = {event.epoch: EpochCheck.read(report.epochs / str(event.epoch)) for event in metrics.epochs}
    checks = {epoch: check for epoch, check in found.items() if check is not None}
    album = Album()
    values: dict[str, Any] = {
        "title": report.title,
        "sentences": report.sentences,
        "kept": report.kept,
        "latest": None,
        "coverage_figures": [],
        "sheet": _data_url(report.sheet),
        "tables": loss_tables(metrics.epochs),
        "config": report.config.read_text(encoding="utf-8"),
    }
    if checks:
        values |= _copy_values(checks, report, album)
        values["glance_rows"] = epoch_rows(checks, metrics, report.kept)
    if metrics.steps:
        values["loss_figures"] = loss_figures(metrics)
        values["coverage_figures"] = coverage_figures(metrics.steps, report.gallery, album)
    write_text(target, render("report.html", **values))


def _copy_values(checks: Checks, report: Report, album: Album) -> dict[str, Any]:
    comparisons = Comparisons(checks, report.epochs, report.gallery, album)
    grids = comparisons.grids()
    latest, *earlier = (
        {"epoch": epoch, "check": checks[epoch], "pairs": comparisons.pairs(epoch)}
        for epoch in sorted(checks, reverse=True)
    )
    judged = judged_epoch(checks, report.kept)
    return {
        "judged": {"epoch": judged, "check": checks[judged]},
        "grids": grids,
        "latest": latest,
        "earlier_checks": earlier,
        "copy_figures": copy_figures(checks),
    }


def _data_url(png: Path) -> str:
    if not png.exists():
        return ""
    return f"data:image/png;base64,{base64.b64encode(png.read_bytes()).decode('ascii')}"
