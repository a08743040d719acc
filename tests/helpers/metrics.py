"""Steps and epochs as a run records them, and the file it records them in."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sdlora.events import EpochDone, StepDone


def step(
    number: int, examples: Sequence[str], timesteps: Sequence[int], *, epoch: int = 1, loss: float = 0.1
) -> StepDone:
    losses = [loss for _ in examples]
    return StepDone(epoch, number, loss, 1e-3, list(examples), [1 for _ in examples], list(timesteps), losses, 0.1)


def epoch(number: int, **values: Any) -> EpochDone:
    return EpochDone(
        **{"epoch": number, "step": number, "train_loss": None, "validation_loss": None, "seconds": 2.0, **values}
    )


def write_metrics(file: Path, events: Sequence[StepDone | EpochDone]) -> None:
    lines = [json.dumps(event.to_json(), ensure_ascii=False) + "\n" for event in events]
    file.write_text("".join(lines), encoding="utf-8")
