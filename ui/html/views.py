"""Messages, images, the queue, background tasks and runs as HTML.

Values come from `state`; HTML is written in the templates beside this module, and charts, grids and comparisons of a
run are those of its own report.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from sdlora.common.bundled import resolve_data_folder
from sdlora.common.run_files import LossSmoother
from sdlora.common.text import format_range
from sdlora.copycheck.verdict import not_learned
from sdlora.data.checks import image_files
from sdlora.errors import DataError
from sdlora.report.charts import COLORS, Line, line_chart
from sdlora.report.copy_section import Comparisons, copy_figures, epoch_rows, judged_epoch
from sdlora.report.further import further_grids
from sdlora.report.html import Attributes, Figure
from sdlora.report.report import timestep_chart

from ..state.background_tasks import BackgroundTasks, Kind
from ..state.caption_edits import CaptionEdit, differences
from ..state.image_set import Card, SetView
from ..state.queue import Status
from ..state.run_view import RunView
from .render import LARGE_PX, LinkedAlbum, file_url, image_url, img, render

_MAX_DUPLICATES = 12  # groups that are shown side by side
_MAX_CHANGES = 20  # captions of a change that are shown
_MAX_BESIDE = 4  # previews of the result
_MAX_POINTS = 300


def message(text: str, tone: str = "", *, title: str = "") -> str:
    """Lines that should be read, such as an error's, a paragraph each.

    Args:
        tone: "clean", "watch", "copying" (an error) or "busy"; empty for a placeholder.
        title: Stands above it.
    """
    return render("message.html", title=title, lines=[line for line in text.splitlines() if line.strip()], tone=tone)


# --- Images ---------------------------------------------------------------------------------------------------------


def set_summary(view: SetView, *, asks_for: Path | None = None) -> str:
    """The doctor's findings on the whole set, and the question whether anything may be saved in a folder."""
    if asks_for is not None:
        question = (
            f"{asks_for} is a folder of your own. The studio only reads it: images that you take out stay in the "
            "folder. To write captions here, or to add images, allow it once; nothing in it is ever deleted."
        )
        asked = message(question, "busy", title="May the studio save captions in this folder?")
        return f"{set_summary(view)}{asked}"
    if not view.cards:
        return message("Drop 10 to 40 images of one character, style or object above.", title="No images yet")
    title = f"{len(view.cards)} images, {sum(bool(card.caption) for card in view.cards)} captioned"
    if not view.is_checked:
        return message("You can write captions meanwhile.", "busy", title=f"{title}: looking at the images …")
    if view.preserved is not None:
        title += f", and {view.preserved[1]} in {view.preserved[0]} that keep what the base model knows"
    errors = [finding.message for finding in view.findings if finding.severity == "error"]
    warnings = [finding.message for finding in view.findings if finding.severity == "warning"]
    if errors:
        return message("\n".join(errors + warnings), "copying", title=f"{title}: {len(errors)} to fix before training")
    if warnings:
        return message("\n".join(warnings), "watch", title=f"{title}: ready, with {len(warnings)} to look at")
    return message("Ready to train.", "clean", title=f"{title}: no problems found")


def start_page(shown: Path) -> str:
    """What the studio is for, with examples, as long as there are no images."""
    folder = resolve_data_folder("builtin:zumi")
    files = image_files(folder)
    examples = [img(file_url(shown, file), f"A drawing of zumi: {caption}") for file, caption in _captioned(files[:3])]
    return render("start.html", images=examples, num_images=len(files))


def _captioned(files: Sequence[Path]) -> list[tuple[Path, str]]:
    return [(file, file.with_suffix(".txt").read_text(encoding="utf-8").strip()) for file in files]


def caption_changes(edit: CaptionEdit) -> str:
    """What a change of all captions would change, word by word."""
    some = list(edit.captions.items())[:_MAX_CHANGES]
    changes = [(name, differences(*texts)) for name, texts in some]
    return render("caption_changes.html", num_changes=len(edit.captions), changes=changes)


def set_cards(cards: Sequence[Card], folder: Path, shown: Path, set_name: str, *, is_locked: bool = False) -> str:
    """A card for each image of a set: thumbnail with its crop, the doctor's findings, and its caption to edit.

    Images are served from `shown`; the set's name is sent with captions, which cannot be edited if it is locked.
    """
    pairs = [(card, _photo(folder, card, shown)) for card in cards]
    return render("cards.html", cards=pairs, set_name=set_name, is_locked=is_locked, drawn=time.time_ns())


def duplicates(view: SetView, shown: Path, set_name: str) -> str:
    """Near-duplicates side by side, each of which can be taken out."""
    if not view.twins:
        return ""
    cards = {card.name: card for card in view.cards}
    groups = [
        [(name, _photo(view.folder, cards[name], shown)) for name in names] for names in view.twins[:_MAX_DUPLICATES]
    ]
    return render("duplicates.html", groups=groups, num_more=len(view.twins) - len(groups), set_name=set_name)


def _photo(folder: Path, card: Card, shown: Path) -> dict[str, object]:
    """The attributes of an image's `<img>`, None if it cannot be read, and where the frame of its crop lies."""
    if card.size is None and card.severity != "unchecked":
        return {"image": None}
    try:
        url = file_url(shown, folder / card.name)
    except (DataError, OSError):
        return {"image": None}
    # Its place is kept until it is loaded, so that nothing below it moves.
    width, height = card.size or (1, 1)
    return {"image": img(url, card.name) | {"width": width, "height": height}, "inset": _crop_inset(card)}


def _crop_inset(card: Card) -> str:
    """How far the part that is trained on lies inside an image, as CSS; empty if that is all of it."""
    if card.size is None or card.bucket is None:
        return ""
    (width, height), (across, down) = card.size, card.bucket
    scale = max(across / width, down / height)
    x, y = (1 - across / (scale * width)) / 2, (1 - down / (scale * height)) / 2
    return f"{y:.2%} {x:.2%}" if max(x, y) >= 0.005 else ""


# --- Queue and background tasks ---------------------------------------------------------------------------------------


def strip(statuses: Sequence[Status]) -> str:
    """Runs that train or wait, for the top of the page."""
    return render("strip.html", statuses=[one for one in statuses if one.alive or one.word == "waiting"])


def queue(statuses: Sequence[Status]) -> str:
    """Runs that wait, in their order."""
    waiting = sorted((one for one in statuses if one.position is not None), key=lambda one: one.position or 0)
    if not waiting:
        return render("quiet.html", words="The queue is empty. A run started while another one trains waits here.")
    return render("queue.html", statuses=waiting)


def background_task(tasks: BackgroundTasks, kind: Kind) -> str:
    """How the captions by a model, or a run's upload, stand."""
    task = tasks.find(kind)
    if task is None:
        return ""
    stage, written, total = tasks.stage(task), tasks.written(task), len(task.files)
    if kind == "caption":
        title, kept = f"Captions for {task.subject}", f"{written} of {total} were written and are kept."
    else:
        title, kept = f"Upload of {task.subject}", "Files that were uploaded stay on the Hub."
    if stage == "running" and kind == "caption":
        words = f"{written} of {total} written." if written else "Loading the model; the first time it is downloaded."
        return render("task_progress.html", title=title, share=written / total if total else 0.0, words=words)
    if stage == "running":
        return message("It continues if you leave this page.", "busy", title=f"{title}: running")
    if stage == "done":
        return message(f"{tasks.output(task)}\n{tasks.errors(task)}", "clean", title=f"{title}: done")
    if stage == "stopped":
        return message(kept, "watch", title=f"{title}: stopped")
    died = "The process died unexpectedly (killed, out of memory, or the machine was switched off)."
    return message(f"{tasks.errors(task) or died}\n{kept}", "copying", title=f"{title}: failed")


# --- One run, and all of them ---------------------------------------------------------------------------------------


def status_panel(status: Status) -> str:
    """A run's state, and how to continue where it ended early."""
    if status.word == "none":
        return message("Choose one at the top of the page, or start one under Recipe.", title="No run is chosen")
    share = 1.0 if status.word == "done" else 0.0
    state = status.state
    if status.word != "done" and state is not None and state.step and state.total_steps:
        share = state.step / state.total_steps
    elif status.word != "done" and state is not None and state.total:
        share = state.done / state.total  # of what comes before the first step
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
    album = LinkedAlbum(shown, run.key)
    # Without a check all previews of the epochs are shown alike.
    epochs = run.previews if run.checks else ()
    further = further_grids(run.folder, epochs, album, lambda file: file_url(shown, file))
    if run.checks:
        return render("epoch_grid.html", grids=[*_comparisons(run, shown).grids(), *further])
    if not run.previews:
        return render("quiet.html", words="The first previews, by the base model, come before training.")
    columns = [
        (epoch, [img(file_url(shown, file), f"epoch {epoch}") for file in files])
        for epoch, files in run.previews.items()
    ]
    return render("previews.html", columns=columns) + (render("epoch_grid.html", grids=further) if further else "")


def copy_banner(run: RunView, status: Status) -> str:
    """The verdict on top, and what to do if an epoch copies."""
    if not run.checks:
        if not (run.config.copycheck.enabled and run.config.preview.enabled):
            needs = "It compares previews. For the next run turn on Draw previews and Check for copies, under More."
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


def result_panel(run: RunView, status: Status, shown: Path) -> str:
    """The recommended epoch beside the base model and why, every epoch in a row, and the files."""
    recommended = run.recommended()
    if recommended is None:
        return message("The first epoch is not complete yet.", title="No result yet")
    kept, reason = recommended
    judged = [told for told in (run.checks[kept].reason, run.checks[kept].advice) if told] if kept in run.checks else []
    tone = "watch" if not_learned(run.checks.get(kept), run.metrics.validation_losses(), kept) else "clean"
    return render(
        "result.html", run=run, kept=kept, reason=reason, judged=judged, tone=tone, is_final=status.word == "done",
        rows=epoch_rows(run.checks, run.metrics, kept), url=f"/studio/run/{run.name}",
        pairs=_beside_base(run, kept, shown),
    )  # fmt: skip


def _beside_base(run: RunView, epoch: int, shown: Path) -> list[tuple[str, list[Attributes]]]:
    """Previews of new prompts by the base model and by an epoch, each with its prompt; of any if none is new."""
    base, learned = ({file.name: file for file in run.previews.get(number, [])} for number in (0, epoch))
    prompts = {Path(match.file).name: match for match in (run.checks[epoch].previews if epoch in run.checks else ())}
    both = [name for name in learned if name in base]
    new = [name for name in both if name in prompts and prompts[name].kind == "novel"]
    found = []
    for name in (new or both)[:_MAX_BESIDE]:
        words = prompts[name].prompt if name in prompts else ""
        images = ((base[name], f"the base model: {words}"), (learned[name], f"epoch {epoch}: {words}"))
        found.append((words, [img(file_url(shown, file, longest_px=LARGE_PX), alt) for file, alt in images]))
    return found


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
        facts = status.error or "" if status.word == "unreadable" else ""
        return {"status": status, "verdict": None, "images": [], "facts": facts}
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
