"""What is shown of a run, as HTML: how far it is, its epochs, what the copy check found, what to keep.

Charts, grid and comparisons are those of the run's own report.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from sdlora.common.metrics import LossSmoother
from sdlora.common.text import format_range
from sdlora.report.charts import COLORS, Line, bar_chart, line_chart
from sdlora.report.comparisons import Comparisons
from sdlora.report.copy_section import copy_figures, epochs_at_a_glance, verdict_banner, verdict_chip
from sdlora.report.html import figure

from ..state.run_status import Status
from ..state.run_view import RunView
from .image_urls import LinkedAlbum, shown_image, shown_url
from .views import box, message, progress_words, state_chip, text

_MOST_POINTS = 300
_BINS = 20


def status_panel(status: Status) -> str:
    """How a run stands, with the way to go on where it ended early."""
    if status.word == "none":
        return message("Start one under Recipe, or choose one above.", title="No run is chosen")
    share = 0.0
    if status.word == "done":
        share = 1.0
    elif status.state is not None and status.state.total_steps:
        share = status.state.step / status.state.total_steps
    bar = (
        f"<div class='bar' role='progressbar' aria-label='Steps done' aria-valuemin='0' aria-valuemax='100' "
        f"aria-valuenow='{round(100 * share)}'><span style='width: {share:.1%}'></span></div>"
    )
    head = f"<div class='row'><h2>{text(status.name)}</h2>{state_chip(status)}</div>"
    return box(head + bar + f"<p class='now'>{text(progress_words(status))}</p>") + _way_on(status)


def _way_on(status: Status) -> str:
    if status.word == "failed":
        log = f"<pre tabindex='0' aria-label='The end of the log'>{text(status.log)}</pre>" if status.log else ""
        return message(
            f"{status.error}\nPress Resume to go on from the last checkpoint; epochs that are complete stay usable. If "
            "it fails again, the log's last lines say where.",
            "copying",
            title="The run failed",
        ) + box(log)
    if status.word == "stopped":
        return message("Its state is saved. Press Resume to go on exactly where it stopped.", "watch", title="Stopped")
    if status.word == "paused":
        return message(
            "It keeps its memory and its place. Press Continue, or Stop to save it and free the device.", "watch"
        )
    return ""


def training_charts(run: RunView) -> str:
    """The smoothed loss with the validation loss beside it, and the noise levels that were visited."""
    if not run.metrics.steps:
        return box("<p class='quiet'>Charts appear with the first steps.</p>")
    smoother = LossSmoother()
    smooth = {event.step: smoother.add(event.loss) for event in run.metrics.steps}
    steps = list(smooth)
    validation = {one.step: one.validation_loss for one in run.metrics.epochs if one.validation_loss is not None}
    x = sorted({*steps[:: max(1, len(steps) // _MOST_POINTS)], steps[-1], *validation})
    lines = [Line("training", [smooth.get(step) for step in x], COLORS[3])]
    if validation:
        lines.append(Line("held out", [validation.get(step) for step in x], COLORS[1]))
    loss = line_chart(lines, x, x_name="step", y_name="loss, smoothed")
    exposed = [level for event in run.metrics.steps for level in event.timesteps]
    counts = [0] * _BINS
    for level in exposed:
        counts[min(_BINS - 1, level * _BINS // 1000)] += 1
    levels = bar_chart(counts, [0, 200, 400, 600, 800, 1000], x_name="noise level", y_name="visits")
    return box(
        "<div class='charts'>"
        + figure("Loss", loss, "Where the validation loss rises while the other falls, it learns by heart.")
        + figure(
            "Noise levels covered", levels, "Every level should be visited: low ones are detail, high ones layout."
        )
        + "</div>"
    )


def epoch_grid(run: RunView, shown: Path) -> str:
    """All previews, a column for each epoch, the base first; those that match a training image are marked."""
    if run.checks:
        comparisons = Comparisons(run.checks, run.folder / "epochs", run.training_images(), LinkedAlbum(shown, run.key))
        return box(comparisons.grid().replace("href='#pair-", "href='#' data-pair='pair-"))
    if not run.previews:
        return box("<p class='quiet'>The first previews come before training: what the base draws by itself.</p>")
    columns = "".join(
        f"<figure><figcaption>{'base' if epoch == 0 else f'epoch {epoch}'}</figcaption>"
        + "".join(_image(shown, file, f"epoch {epoch}") for file in files)
        + "</figure>"
        for epoch, files in run.previews.items()
    )
    return box(f"<div class='columns'>{columns}</div>")


def copy_banner(run: RunView, status: Status) -> str:
    """The verdict on top, and what to do if an epoch copies."""
    if not run.checks:
        if not (run.config.copycheck.enabled and run.config.preview.enabled):
            return message(
                "copycheck.enabled and preview.enabled are both needed for it.", "watch", title="No copy check"
            )
        return message("It comes with the first previews.", title="Nothing was compared yet")
    copying = [epoch for epoch, check in run.checks.items() if epoch > 0 and check.verdict == "copying"]
    banner = box(verdict_banner(run.checks, None))
    if not copying:
        return banner
    advice = "Stop here: later epochs copy more." if status.alive else "Keep an earlier epoch; Result says which."
    return message(advice, "copying", title=f"Epoch {copying[0]} copies training images") + banner


def copy_pairs(run: RunView, epoch: int, shown: Path) -> str:
    """Every preview of an epoch beside the training image that it is most like."""
    if epoch not in run.checks:
        return box("")
    comparisons = Comparisons(run.checks, run.folder / "epochs", run.training_images(), LinkedAlbum(shown, run.key))
    check = run.checks[epoch]
    return box(f"<p class='row'>{verdict_chip(check)} {text(check.reason)}</p>{comparisons.pairs(epoch)}")


def copy_charts(run: RunView) -> str:
    """How the signs of copying went from epoch to epoch."""
    return box(copy_figures(run.checks)) if len(run.checks) > 1 else box("")


def result_panel(run: RunView, status: Status) -> str:
    """The epoch to keep and why, every epoch in a row, and the files."""
    found = run.recommended()
    if found is None:
        return message("The first epoch is not complete yet.", title="No result yet")
    epoch, reason = found
    final = status.word == "done"
    title = f"Epoch {epoch} is the one to keep" if final else f"So far, epoch {epoch} is the one to keep"
    metrics = run.metrics
    glance = epochs_at_a_glance(run.checks, metrics.epochs, metrics.steps, epoch) if metrics.epochs else ""
    return message(reason, "clean", title=title) + box(glance) + box(_downloads(run, epoch, final))


def _downloads(run: RunView, kept: int, final: bool) -> str:
    name, base = html.escape(run.name, quote=True), f"/studio/run/{html.escape(run.name, quote=True)}"
    triggers = " or ".join(f"<b>{html.escape(trigger)}</b>" for trigger in run.config.data.triggers)
    links = "".join(
        f"<a class='button{' primary' if epoch == kept else ''}' download href='{base}/epoch/{epoch}'>"
        f"Epoch {epoch}{', the one to keep' if epoch == kept else ''}</a>"
        for epoch in run.loras
    )
    told = f"Write {triggers} into the prompt." if triggers else "It has no trigger word."
    finished = "It was loaded back through diffusers before you see it here." if final else ""
    return (
        f"<h3>Download</h3><p class='links'>{links}<a class='button' download href='{base}/all.zip'>All epochs</a>"
        f"<a class='button' download href='{base}/config.toml'>Settings</a></p>"
        f"<div class='where'><p>Where <code>{name}.safetensors</code> goes. {told} {finished}</p><dl>"
        "<dt>ComfyUI</dt><dd><code>models/loras</code>, then the node Load LoRA</dd>"
        "<dt>A1111, Forge</dt><dd><code>models/Lora</code>, then <code>&lt;lora:"
        f"{name}:1&gt;</code> in the prompt</dd>"
        f'<dt>diffusers</dt><dd><code>pipe.load_lora_weights("{name}.safetensors")</code></dd></dl></div>'
    )


def tried(shown: Path, images: Mapping[str, Image.Image], key: str) -> str:
    """Images that were drawn on demand, side by side with what each is.

    Args:
        shown: The folder that images are served from.
        images: By what is written below each.
        key: The same for the same images alone.
    """
    figures = []
    for label, image in images.items():
        url = shown_image(shown, f"{key} {label}", image.copy, longest_px=768)
        crisp = " class='crisp'" if url.endswith(".png") else ""
        figures.append(
            f"<figure><img src='{url}' alt='{text(label)}'{crisp}><figcaption>{text(label)}</figcaption></figure>"
        )
    return box(f"<div class='tried'>{''.join(figures)}</div>")


def run_cards(runs: Sequence[tuple[Status, RunView | None]], shown: Path) -> str:
    """Every run with its last previews, its verdict and what was set."""
    if not runs:
        return message("They gather here, with their images and settings.", title="No runs yet")
    return box(f"<div class='runs'>{''.join(_run_card(status, run, shown) for status, run in runs)}</div>")


def _run_card(status: Status, run: RunView | None, shown: Path) -> str:
    images = facts = verdict = ""
    if run is not None:
        last = max(run.previews, default=None)
        files = [] if last is None else run.previews[last][:3]
        images = "".join(_image(shown, file, f"{run.name}, epoch {last}") for file in files)
        config = run.config
        facts = (
            f"{config.train.epochs} epochs × {format_range(*config.data.repeats_range)} repeats, "
            f"rank {config.lora.rank}, base {config.base.path}"
        )
        found = run.recommended()
        if found is not None and found[0] in run.checks:
            verdict = verdict_chip(run.checks[found[0]])
    return (
        f"<article class='run'><div class='row'><b>{text(status.name)}</b>{state_chip(status)}{verdict}</div>"
        f"<div class='thumbs'>{images}</div><p class='quiet'>{text(facts)}</p></article>"
    )


def settings_table(first: str, second: str, rows: Sequence[tuple[str, object, object]]) -> str:
    """The settings that two runs do not share."""
    if not rows:
        return message("They have the same settings.")
    body = "".join(
        f"<tr><th scope='row'>{text(name)}</th><td>{text(one)}</td><td>{text(other)}</td></tr>"
        for name, one, other in rows
    )
    return box(
        f"<div class='wide' tabindex='0' role='region' aria-label='Settings that differ'><table class='settings'>"
        f"<tr><th scope='col'>Setting</th><th scope='col'>{text(first)}</th><th scope='col'>{text(second)}</th></tr>"
        f"{body}</table></div>"
    )


def _image(shown: Path, file: Path, alt: str) -> str:
    url = shown_url(shown, file)
    crisp = " class='crisp'" if url.endswith(".png") else ""
    return f"<img src='{url}' alt='{text(alt)}' loading='lazy'{crisp}>"
