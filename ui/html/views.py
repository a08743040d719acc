"""Messages, images, the queue and background tasks as HTML.

Values come from `state`; HTML is written in the templates beside this module.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sdlora.errors import DataError, SdloraError

from ..state.background_tasks import BackgroundTasks, Kind
from ..state.image_set import Card, SetView
from ..state.queue import Status
from .image_urls import file_url, img
from .render import render

_MAX_DUPLICATES = 12  # groups that are shown side by side


def message(text: str, tone: str = "", *, title: str = "") -> str:
    """Lines that should be read, such as an error's, a paragraph each.

    Args:
        tone: "clean", "watch", "copying" (an error) or "busy"; empty for a placeholder.
        title: Stands above it.
    """
    return render("message.html", title=title, lines=[line for line in text.splitlines() if line.strip()], tone=tone)


def failure(error: SdloraError) -> str:
    """An error as a message."""
    return message(str(error), "copying")


# --- Images ---------------------------------------------------------------------------------------------------------


def set_summary(view: SetView) -> str:
    """The doctor's findings on the whole set."""
    if not view.cards:
        return message("Drop 10 to 40 images of one character, style or object above.", title="No images yet")
    title = f"{len(view.cards)} images, {sum(bool(card.caption) for card in view.cards)} captioned"
    errors = [finding.message for finding in view.findings if finding.severity == "error"]
    warnings = [finding.message for finding in view.findings if finding.severity == "warning"]
    if errors:
        return message("\n".join(errors + warnings), "copying", title=f"{title}: {len(errors)} to fix before training")
    if warnings:
        return message("\n".join(warnings), "watch", title=f"{title}: ready, with {len(warnings)} to look at")
    return message("Ready to train.", "clean", title=f"{title}: no problems found")


def set_cards(cards: Sequence[Card], folder: Path, shown: Path, set_name: str) -> str:
    """A card for each image of a set: thumbnail with its crop, the doctor's findings, and its caption to edit.

    Images are served from `shown`; the set's name is sent with captions.
    """
    if not cards:
        return ""
    return render("cards.html", cards=[(card, _photo(folder, card, shown)) for card in cards], set_name=set_name)


def duplicates(view: SetView, shown: Path) -> str:
    """Near-duplicates side by side."""
    if not view.twins:
        return ""
    cards = {card.name: card for card in view.cards}
    groups = [
        [(name, _photo(view.folder, cards[name], shown)) for name in names] for names in view.twins[:_MAX_DUPLICATES]
    ]
    return render("duplicates.html", groups=groups, num_more=len(view.twins) - len(groups))


def _photo(folder: Path, card: Card, shown: Path) -> dict[str, object]:
    """The attributes of an image's `<img>`, None if it cannot be read, and where the frame of its crop lies."""
    try:
        url = file_url(shown, folder / card.name)
    except (DataError, OSError):
        return {"image": None}
    return {"image": img(url, card.name), "inset": _crop_inset(card)}


def _crop_inset(card: Card) -> str:
    """How far the part that is trained on lies inside an image, as CSS; empty if that is all of it."""
    if card.size is None or card.bucket is None:
        return ""
    (width, height), (across, down) = card.size, card.bucket
    scale = max(across / width, down / height)
    x, y = (1 - across / (scale * width)) / 2, (1 - down / (scale * height)) / 2
    return f"{y:.2%} {x:.2%}" if max(x, y) >= 0.005 else ""


# --- Runs and background tasks ----------------------------------------------------------------------------------------


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
