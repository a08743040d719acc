"""How far a run is: the content of `state.json` as a value.

Written by `run`, which replaces the file atomically; read by `push` and by the studio.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sdlora.events import fields_from_json

RunStatus = Literal["running", "done", "stopped", "failed"]


@dataclass(frozen=True, kw_only=True)
class RunState:
    """What a run says about itself; "running" stays in the file if its process is killed.

    Attributes:
        phase: "start", "train", or the phase of the last `Progress` event.
        epoch: The epoch it is in; 0 before training.
        total_steps: Steps of the whole run; None until they are known.
        done: Progress within the phase, of `total`.
        eta_seconds: Time to the end of the run, previews included; None while unknown.
        pid: The process that wrote the file.
        started: When that process started, as an ISO date with its time zone, to the second.
        error: Why it failed; None if it did not.
        closing_seconds: What the end of an epoch takes; None until one was measured.
    """

    status: RunStatus = "running"
    phase: str = "start"
    epoch: int = 0
    step: int = 0
    total_steps: int | None = None
    done: int = 0
    total: int = 0
    eta_seconds: float | None = None
    pid: int
    started: str
    error: str | None = None
    closing_seconds: float | None = None


def read_state(file: Path) -> RunState | None:
    """The state in a file; None if the file is missing or is not the state of a run."""
    try:
        return RunState(**fields_from_json(RunState, json.loads(file.read_text(encoding="utf-8"))))
    except (OSError, ValueError, TypeError):
        return None
