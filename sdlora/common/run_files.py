"""What a run writes as it goes, as values: `state.json`, how far it is, and `metrics.jsonl`, its steps and epochs.

Written by `run`, the state atomically; read by the report, the batch, `push` and the studio.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from sdlora.errors import OutputError
from sdlora.events import EpochDone, StepDone, fields_from_json

LOSS_DECAY = 0.95
RunStatus = Literal["running", "done", "stopped", "failed"]


@dataclass(frozen=True)
class Metrics:
    """The optimizer steps and ends of epochs that were recorded of a run, in order; epoch 0 is the base model."""

    steps: list[StepDone] = field(default_factory=list)
    epochs: list[EpochDone] = field(default_factory=list)

    def validation_losses(self) -> dict[int, float]:
        """The validation loss of every epoch that has one."""
        return {event.epoch: event.validation_loss for event in self.epochs if event.validation_loss is not None}


def read_metrics(file: Path) -> Metrics:
    """The metrics of a run; empty if it has recorded none.

    A last line without its line feed is being written, or was cut off by a crash, and is left out.

    Raises:
        OutputError: Another line is not a recorded event.
    """
    found = Metrics()
    # Lines end in a line feed alone: `splitlines` would also split at U+2028, which JSON strings may hold.
    lines = file.read_bytes().split(b"\n")[:-1] if file.is_file() else []
    for number, line in enumerate(lines, start=1):
        try:
            row: dict[str, Any] = json.loads(line)
            if row["event"] == StepDone.name:
                found.steps.append(StepDone(**fields_from_json(StepDone, row)))
            elif row["event"] == EpochDone.name:
                found.epochs.append(EpochDone(**fields_from_json(EpochDone, row)))
        except (ValueError, KeyError, TypeError) as error:
            raise OutputError(f"{file}, line {number} is not an event of a run ({error}).") from error
    return found


class LossSmoother:
    """Exponential moving average without the bias towards its first values.

    Source: Kingma and Ba 2015, "Adam", section 3: m_t = d m_(t-1) + (1 - d) x_t, shown as m_t / (1 - d^t).
    """

    def __init__(self) -> None:
        self._mean = 0.0
        self._weight = 0.0

    def add(self, loss: float) -> float:
        """The mean with one more loss in it."""
        self._mean = LOSS_DECAY * self._mean + (1 - LOSS_DECAY) * loss
        self._weight = LOSS_DECAY * self._weight + (1 - LOSS_DECAY)
        return self._mean / self._weight


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
