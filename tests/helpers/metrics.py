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


ROWS: list[StepDone | EpochDone] = [
    epoch(0, validation_loss=0.3, validation_bands=[0.5, 0.4, 0.3, 0.2, 0.1], validation_change=[0.0] * 5),
    step(1, ["<a>.png", "b.png"], [10, 480], loss=0.5),
    step(2, ["b.png", "<a>.png"], [990, 60], loss=0.25),
    epoch(
        1, train_loss=0.4, train_bands=[0.61, None, 0.41, None, 0.21], validation_loss=0.25,
        validation_bands=[0.41, 0.31, 0.21, 0.11, 0.05], validation_change=[-0.09, -0.09, -0.09, -0.09, -0.05],
    ),
]  # fmt: skip
"""The base model and one epoch of two images, each seen twice."""
