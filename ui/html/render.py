"""The studio's own templates, beside those of the report, whose parts they use; and the words for how a run stands.

What a template gives is HTML with every value escaped; the pages hand it to Gradio as it is.
"""

from __future__ import annotations

import functools
from pathlib import Path

from jinja2 import Environment

from sdlora.common.text import format_seconds
from sdlora.copycheck.null_distribution import PHASE as NULL_PHASE
from sdlora.report.html import environment

from ..state.queue import Status

_PHASES = {
    "start": "preparing", "train": "training", "previews": "generating previews",
    "cache captions": "encoding captions", "cache pictures": "encoding images", "page": "writing the report",
    NULL_PHASE: "generating images with the base model",
}  # fmt: skip
"""Phases, as a run writes them to `state.json`, in words."""

WORDS = {
    "waiting": "queued", "starting": "starting", "running": "running", "paused": "paused",
    "stopping": "stopping and saving", "stopped": "stopped", "failed": "failed", "done": "done", "none": "not started",
}  # fmt: skip
"""The states of runs in words."""

_TONES = {
    "running": "busy", "starting": "busy", "waiting": "busy", "paused": "watch", "stopping": "watch",
    "stopped": "watch", "failed": "copying", "done": "clean", "none": "",
}  # fmt: skip
"""The colours of the states, as classes of the style sheet."""


def progress_words(status: Status) -> str:
    """A run's phase, step and time left."""
    state = status.state
    if state is None:
        return ""
    if status.word == "done":
        return "Every epoch is complete."
    if status.can_resume:
        return f"Reached step {state.step} of {state.total_steps}." if state.total_steps else ""
    # The report ends an epoch; no event comes between it and the next epoch's first steps.
    phase = "train" if state.phase == "page" and state.step < (state.total_steps or 0) else state.phase
    words = [_PHASES.get(phase, phase)]
    if phase == "train" and state.total_steps:
        words.append(f"step {state.step} of {state.total_steps}")
    elif state.total > 1:
        words.append(f"{state.done} of {state.total}")
    if state.eta_seconds is not None and status.word in ("running", "paused"):
        words.append(f"about {format_seconds(state.eta_seconds)} left")
    return ", ".join(words)


def render(template: str, **values: object) -> str:
    """A part of a page, from one of the studio's templates."""
    return _environment().get_template(template).render(values).strip()


@functools.cache
def _environment() -> Environment:
    made = environment(Path(__file__).parent / "templates")
    made.globals |= {"words": WORDS, "tones": _TONES}
    made.filters["progress"] = progress_words
    return made
