"""How a run stands, in words: for the strip on top, the training page and the list of runs.

Phases are those that a run writes to `state.json`.
"""

from __future__ import annotations

from sdlora.common.text import format_seconds
from sdlora.copycheck.null_distribution import PHASE as NULL_PHASE

from ..state.run_status import Status

_PHASES = {
    "start": "preparing", "train": "training", "previews": "generating previews",
    "cache captions": "encoding captions", "cache pictures": "encoding images", "page": "writing the report",
    NULL_PHASE: "generating images with the base model",
}  # fmt: skip
WORDS = {
    "waiting": "queued", "starting": "starting", "running": "running", "paused": "paused",
    "stopping": "stopping and saving", "stopped": "stopped", "failed": "failed", "done": "done", "none": "not started",
}  # fmt: skip
_TONES = {
    "running": "busy", "starting": "busy", "waiting": "busy", "paused": "watch", "stopping": "watch",
    "stopped": "watch", "failed": "copying", "done": "clean", "none": "",
}  # fmt: skip


def tone(status: Status) -> str:
    """The colour of a run's state, as a class of the style sheet."""
    return _TONES[status.word]


def state_words(status: Status) -> str:
    """A run's state in a word or two."""
    return WORDS[status.word] if status.position is None else f"number {status.position} in the queue"


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
