"""Views of a run as HTML: its state, its epochs, the copy check, the recommended epoch.

Charts, grids and comparisons are those of the run's own report.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from sdlora.common.metrics import LossSmoother
from sdlora.common.text import format_range
from sdlora.report.charts import COLORS, Line, line_chart
from sdlora.report.comparisons import Comparisons
from sdlora.report.copy_section import copy_figures, epoch_rows, judged_epoch
from sdlora.report.html import Figure
from sdlora.report.training_section import timestep_chart

from ..state.queue import Status
from ..state.run_view import RunView
from .image_urls import LARGE_PX, LinkedAlbum, file_url, image_url, img
from .render import render
from .views import message

_MAX_POINTS = 300


def status_panel(status: Status) -> str:
    """A run's state, and how to continue where it ended early."""
    if status.word == "none":
        return message("Choose one at the top of the page, or start one under Recipe.", title="No run is chosen")
    share = 1.0 if status.word == "done" else 0.0
    if status.word != "done" and status.state is not None and status.state.total_steps:
        share = status.state.step / status.state.total_steps
    return render("status.html", status=status, share=share)


def training_charts(run: RunView) -> str:
    """The smoothed training loss with the validation loss, and how often timesteps were seen."""
    events = run.metrics.steps
    if not events:
        return render("quiet.html", words="Charts appear with the first steps.")
    smoother = LossSmoother()
    smooth = {event.step: smoother.add(event.loss) for event in events}
    steps = list(smooth)
    validation = {one.step: one.validation_loss for one in run.metrics.epochs if one.validation_loss is not None}
    x = sorted({*steps[:: max(1, len(steps) // _MAX_POINTS)], steps[-1], *validation})
    lines = [Line("training", [smooth.get(step) for step in x], COLORS[3])]
    if validation:
        lines.append(Line("validation", [validation.get(step) for step in x], COLORS[1]))
    figures = [
        Figure(
            "Loss",
            line_chart(lines, x, x_name="step", y_name="loss, smoothed"),
            "If the validation loss rises while the training loss falls, the LoRA is memorizing.",
        ),
        Figure(
            "Timestep coverage",
            timestep_chart([timestep for event in events for timestep in event.timesteps]),
            "All timesteps should be seen: low ones teach details, high ones the composition.",
        ),
    ]
    return render("charts.html", figures=figures)


def epoch_grid(run: RunView, shown: Path) -> str:
    """All previews, a column for each epoch, the base first; those that match a training image are marked."""
    if run.checks:
        return render("epoch_grid.html", grids=_comparisons(run, shown).grids())
    if not run.previews:
        return render("quiet.html", words="The first previews, by the base model, come before training.")
    columns = [
        (epoch, [img(file_url(shown, file), f"epoch {epoch}") for file in files])
        for epoch, files in run.previews.items()
    ]
    return render("previews.html", columns=columns)


def copy_banner(run: RunView, status: Status) -> str:
    """The verdict on top, and what to do if an epoch copies."""
    if not run.checks:
        if not (run.config.copycheck.enabled and run.config.preview.enabled):
            needs = "It needs both copycheck.enabled and preview.enabled."
            return message(needs, "watch", title="The copy check is off")
        return message("The first check comes with the first previews.", title="Nothing was compared yet")
    copying = [epoch for epoch, check in run.checks.items() if epoch > 0 and check.verdict == "copying"]
    warning = None
    if copying:
        stop, keep = "Stop here: later epochs copy more.", "Keep an earlier epoch; the Result page recommends one."
        warning = {"title": f"Epoch {copying[0]} copies training images", "lines": [stop if status.alive else keep]}
    latest = judged_epoch(run.checks, None)
    return render("copy_banner.html", warning=warning, check=run.checks[latest], epoch=latest)


def copy_pairs(run: RunView, epoch: int, shown: Path) -> str:
    """Every preview of an epoch beside its nearest training image."""
    if epoch not in run.checks:
        return ""
    return render("copy_pairs.html", check=run.checks[epoch], all_pairs=_comparisons(run, shown).pairs(epoch))


def copy_charts(run: RunView) -> str:
    """How the signs of copying developed from epoch to epoch."""
    return render("charts.html", figures=copy_figures(run.checks)) if len(run.checks) > 1 else ""


def result_panel(run: RunView, status: Status) -> str:
    """The recommended epoch and why, every epoch in a row, and the files."""
    recommended = run.recommended()
    if recommended is None:
        return message("The first epoch is not complete yet.", title="No result yet")
    kept, reason = recommended
    return render(
        "result.html", run=run, kept=kept, reason=reason, is_final=status.word == "done",
        rows=epoch_rows(run.checks, run.metrics, kept), url=f"/studio/run/{run.name}",
    )  # fmt: skip


def tried(shown: Path, images: Mapping[str, Image.Image], key: str) -> str:
    """Images that were drawn on demand, side by side.

    Args:
        shown: The folder that images are served from.
        images: By the label below each.
        key: The same for the same images alone.
    """
    urls = {
        label: image_url(shown, f"{key} {label}", image.copy, longest_px=LARGE_PX) for label, image in images.items()
    }
    return render("tried.html", images=[img(url, label) for label, url in urls.items()])


def run_cards(runs: Sequence[tuple[Status, RunView | None]], shown: Path) -> str:
    """Every run with its last previews, its verdict and its main settings."""
    if not runs:
        return message("Runs appear here with their previews and settings.", title="No runs yet")
    return render("runs.html", runs=[_run_card(status, run, shown) for status, run in runs])


def _run_card(status: Status, run: RunView | None, shown: Path) -> dict[str, object]:
    if run is None:
        return {"status": status, "verdict": None, "images": [], "facts": ""}
    last = max(run.previews, default=0)
    config, recommended = run.config, run.recommended()
    is_judged = recommended is not None and recommended[0] in run.checks
    return {
        "status": status,
        "verdict": run.checks[recommended[0]].verdict if recommended is not None and is_judged else None,
        "images": [img(file_url(shown, file), f"{run.name}, epoch {last}") for file in run.previews.get(last, [])[:3]],
        "facts": f"{config.train.epochs} epochs × {format_range(*config.data.repeats_range)} repeats, "
        f"rank {config.lora.rank}, base model {config.base.path}",
    }


def settings_table(first: str, second: str, rows: Sequence[tuple[str, object, object]]) -> str:
    """The settings in which two runs differ."""
    if not rows:
        return message("Both runs have the same settings.")
    return render("differences.html", first=first, second=second, rows=rows)


def _comparisons(run: RunView, shown: Path) -> Comparisons:
    return Comparisons(run.checks, run.folder / "epochs", run.training_images(), LinkedAlbum(shown, run.key))
