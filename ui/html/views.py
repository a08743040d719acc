"""What is shown of images, plans and the queue, as HTML; everything that a person wrote is escaped.

Pure but for the small images that it has made.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

from sdlora.common.text import format_seconds
from sdlora.errors import DataError, SdloraError

from ..state.background_tasks import BackgroundTask, BackgroundTasks
from ..state.image_set import Card, SetView
from ..state.run_status import Status
from .image_urls import shown_url

_MOST_TWINS = 12  # groups that are shown side by side
_MARKS = {"fine": ("✓", "fine"), "warning": ("!", "look again"), "error": ("✕", "to mend")}
PHASES = {
    "start": "getting ready", "train": "training", "previews": "drawing previews", "cache captions": "reading captions",
    "cache pictures": "reading images", "heldout": "measuring validation images",
    "page": "writing the report", "the base's pictures": "learning what the base draws by itself",
}  # fmt: skip
WORDS = {
    "waiting": "waiting in the queue", "starting": "starting: loading the base", "running": "at work",
    "paused": "paused", "stopping": "stopping and saving", "stopped": "stopped, saved", "failed": "failed",
    "done": "done", "none": "not started",
}  # fmt: skip
_TONES = {
    "running": "busy", "starting": "busy", "waiting": "busy", "paused": "watch", "stopping": "watch",
    "stopped": "watch", "failed": "copying", "done": "clean", "none": "",
}  # fmt: skip


def text(words: object) -> str:
    """Anything as HTML text, safe in attributes too."""
    return html.escape(str(words), quote=True)


def box(content: str, kind: str = "") -> str:
    """A part of the page; the studio's style sheet only reaches inside of these."""
    return f"<div class='sd {kind}'>{content}</div>"


def message(sentence: str, tone: str = "", *, title: str = "") -> str:
    """One or more lines that should be read, such as an error's."""
    head = f"<strong>{text(title)}</strong>" if title else ""
    lines = "".join(f"<p>{text(line)}</p>" for line in sentence.splitlines() if line.strip())
    role = " role='alert'" if tone == "copying" else ""
    return box(f"<div class='verdict {tone}'{role}>{head}{lines}</div>")


def failure(error: SdloraError) -> str:
    """An error as a message."""
    return message(str(error), "copying")


# --- Images ---------------------------------------------------------------------------------------------------------


def set_summary(view: SetView) -> str:
    """What the doctor says of the whole set."""
    if not view.cards:
        return message(
            "Drop 10 to 40 images of one thing above: a character, a style, an object.", title="No images yet"
        )
    captioned = sum(bool(card.caption) for card in view.cards)
    errors = [finding.message for finding in view.findings if finding.severity == "error"]
    warnings = [finding.message for finding in view.findings if finding.severity == "warning"]
    title = f"{len(view.cards)} images, {captioned} with a caption"
    if errors:
        return message("\n".join(errors + warnings), "copying", title=f"{title}: {len(errors)} to mend before training")
    if warnings:
        return message("\n".join(warnings), "watch", title=f"{title}: ready, with {len(warnings)} to look at")
    return message("Ready to train.", "clean", title=f"{title}: nothing to mend")


def set_cards(cards: Sequence[Card], folder: Path, shown: Path, images: str) -> str:
    """A card for each image: thumbnail with its crop, verdict with reasons, and its caption to write on.

    Args:
        cards: Of a set.
        folder: The set's.
        shown: The folder that images are served from.
        images: The set as the page calls it, to be sent with captions.
    """
    drawn = "".join(_card(folder, card, shown) for card in cards)
    return box(f"<div class='cards' data-set='{text(images)}'>{drawn}</div>" if drawn else "")


def _card(folder: Path, card: Card, shown: Path) -> str:
    name = text(card.name)
    return (
        f"<article class='card' data-image='{name}'><div class='photo'>{_photo(folder, card, shown)}</div>"
        f"<div class='about'><div class='row'><span class='name'>{name}</span>"
        f"<button type='button' class='remove' aria-label='Take {name} out of the set'>Take out</button></div>"
        f"{verdict(card)}"
        f"<textarea rows='3' aria-label='Caption of {name}' placeholder='What is in the image?' "
        f"spellcheck='true'>{text(card.caption)}</textarea>"
        "<div class='saved' role='status'></div></div></article>"
    )


def verdict(card: Card) -> str:
    """The doctor's verdict on one image, with its reasons."""
    mark, word = _MARKS[card.severity]
    tone = {"fine": "clean", "warning": "watch", "error": "copying"}[card.severity]
    reasons = "".join(f"<li>{text(reason)}</li>" for reason in card.findings)
    listed = f"<ul>{reasons}</ul>" if reasons else ""
    return f"<div class='doctor'><span class='chip {tone}'>{mark} {word}</span>{_size(card)}{listed}</div>"


def _size(card: Card) -> str:
    if card.size is None or card.bucket is None:
        return ""
    return f"<span class='quiet'>{card.size[0]}×{card.size[1]}, trained at {card.bucket[0]}×{card.bucket[1]}</span>"


def _photo(folder: Path, card: Card, shown: Path) -> str:
    try:
        url = shown_url(shown, folder / card.name)
    except (DataError, OSError):
        return "<div class='unreadable'>cannot be read</div>"
    crisp = " crisp" if url.endswith(".png") else ""
    return (
        f"<div class='frame'><img class='{crisp.strip()}' src='{url}' alt='{text(card.name)}' loading='lazy'>"
        f"{_crop(card)}</div>"
    )


def _crop(card: Card) -> str:
    """The part of an image that is trained, as a frame over it; nothing where that is all of it."""
    if card.size is None or card.bucket is None:
        return ""
    (width, height), (across, down) = card.size, card.bucket
    scale = max(across / width, down / height)
    x, y = (1 - across / (scale * width)) / 2, (1 - down / (scale * height)) / 2
    if max(x, y) < 0.005:
        return ""
    return f"<span class='crop' style='inset: {y:.2%} {x:.2%}' title='The part inside is trained.'></span>"


def twins(view: SetView, shown: Path) -> str:
    """Near-duplicates side by side."""
    if not view.twins:
        return ""
    more = len(view.twins) - _MOST_TWINS
    rest = f"<p>And {more} more groups; the cards of their images say so.</p>" if more > 0 else ""
    cards = {card.name: card for card in view.cards}
    groups = "".join(
        "<div class='twins'>"
        + "".join(
            f"<figure>{_photo(view.folder, cards[n], shown)}<figcaption>{text(n)}</figcaption></figure>" for n in names
        )
        + "</div>"
        for names in view.twins[:_MOST_TWINS]
    )
    return box(
        f"<h3>The same image twice</h3><p>What is there twice is copied first. Keep one of each.</p>{groups}{rest}"
    )


# --- The plan, the queue and the strip --------------------------------------------------------------------------------


def plan_card(sentences: Sequence[str]) -> str:
    """The plan in words."""
    items = "".join(f"<li>{text(sentence)}</li>" for sentence in sentences)
    return box(f"<div class='plan'><h3>The plan</h3><ul>{items}</ul></div>")


def state_chip(status: Status) -> str:
    """How a run stands, in a word or two."""
    words = WORDS[status.word] if status.position is None else f"number {status.position} in the queue"
    return f"<span class='chip {_TONES[status.word]}'>{text(words)}</span>"


def strip(statuses: Sequence[Status]) -> str:
    """What is at work and what waits, for the top of the page."""
    shown = [status for status in statuses if status.alive or status.word == "waiting"]
    if not shown:
        return box("<p class='strip quiet'>Nothing is being trained.</p>")
    parts = []
    for status in shown:
        detail = "" if status.word == "waiting" else f" {text(progress_words(status))}"
        parts.append(f"<span><b>{text(status.name)}</b> {state_chip(status)}{detail}</span>")
    return box(f"<p class='strip'>{''.join(parts)}</p>")


def progress_words(status: Status) -> str:
    """Phase, step and time left, in words."""
    state = status.state
    if state is None:
        return ""
    if status.word == "done":
        return "Every epoch is complete."
    if status.can_resume:
        return f"It got to step {state.step} of {state.total_steps}." if state.total_steps else ""
    # The report ends an epoch; no event comes between it and the next epoch's first steps.
    phase = "train" if state.phase == "page" and state.step < (state.total_steps or 0) else state.phase
    words = [PHASES.get(phase, phase)]
    if phase == "train" and state.total_steps:
        words.append(f"step {state.step} of {state.total_steps}")
    elif state.total > 1:
        words.append(f"{state.done} of {state.total}")
    if state.eta_seconds is not None and status.word in ("running", "paused"):
        words.append(f"about {format_seconds(state.eta_seconds)} left")
    return ", ".join(words)


def queue(statuses: Sequence[Status]) -> str:
    """What waits, in its order."""
    waiting = [status for status in statuses if status.position is not None]
    if not waiting:
        return box("<p class='quiet'>Nothing waits. A run that is started while another trains gets in line here.</p>")
    items = "".join(
        f"<li>{text(status.name)}</li>" for status in sorted(waiting, key=lambda status: status.position or 0)
    )
    return box(f"<ol class='queue'>{items}</ol>")


# --- Errands ----------------------------------------------------------------------------------------------------------


def caption_task(tasks: BackgroundTasks) -> str:
    """How the captions by a model stand."""
    task = tasks.find("caption")
    if task is None:
        return ""
    stage, written, total = tasks.stage(task), tasks.written(task), len(task.files)
    title = f"Captions for {task.subject}"
    if stage == "running":
        told = f"{written} of {total} written." if written else "Getting the model; the first time it is downloaded."
        share = written / total if total else 0.0
        return box(
            f"<div class='verdict busy' role='status'><strong>{text(title)}</strong><div class='bar'>"
            f"<span style='width: {share:.1%}'></span></div><p>{text(told)}</p></div>"
        )
    return _ended(tasks, task, stage, title, f"{written} of {total} were written; they stay.")


def publish_task(tasks: BackgroundTasks) -> str:
    """How a run's upload stands."""
    task = tasks.find("publish")
    if task is None:
        return ""
    stage, title = tasks.stage(task), f"Upload of {task.subject}"
    if stage == "running":
        return message("It goes on if you leave this page.", "busy", title=f"{title} is under way")
    return _ended(tasks, task, stage, title, "What had arrived stays on the Hub.")


def _ended(tasks: BackgroundTasks, task: BackgroundTask, stage: str, title: str, left: str) -> str:
    if stage == "done":
        return message(f"{tasks.said(task)}\n{tasks.complaint(task)}", "clean", title=f"{title}: done")
    if stage == "stopped":
        return message(left, "watch", title=f"{title}: stopped")
    why = tasks.complaint(task) or "Its process is gone without a word: it was killed, or the machine was off."
    return message(f"{why}\n{left}", "copying", title=f"{title}: failed")
