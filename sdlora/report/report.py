"""The page a person reads during and after a run: one self-contained HTML file.

Written from the run's folder by `templates/report.html`; images are embedded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from sdlora.common.files import write_text
from sdlora.common.metrics import read_metrics
from sdlora.copycheck.verdict import EpochCheck
from sdlora.report.comparisons import Comparisons
from sdlora.report.copy_section import copy_figures, epoch_rows, judged_epoch
from sdlora.report.html import render
from sdlora.report.images import Album, data_url
from sdlora.report.training_section import coverage_figures, loss_figures, loss_tables


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
