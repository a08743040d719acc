"""The progress bar and JSON lines."""

from __future__ import annotations

import io
import json

from rich.console import Console

from sdlora.cli.describe import describe_plan
from sdlora.cli.progress import JsonLines, ProgressBar
from sdlora.events import (
    EpochDone,
    Event,
    Exported,
    Notice,
    PlanMade,
    PreviewsDone,
    Progress,
    RunDone,
    StepDone,
)

PLAN = PlanMade(
    images=24, validation_images=8, split_off=[], repeats=10, epochs=4, exposures_per_image=40, batch_size=4,
    gradient_accumulation_steps=2, steps=120, trained_parameters=50_000, base_parameters=5_000_000,
    targets=["cross_attention", "mlp"], device="cpu", precision="fp32",
)  # fmt: skip


def step(number: int, seconds: float = 0.5) -> StepDone:
    return StepDone(1, number, 0.25, 1e-3, ["a.png"] * 4, [1] * 4, [5] * 4, [0.25] * 4, seconds)


EVENTS: list[Event] = [
    PLAN, Notice("A sentence."), Progress("cache pictures", 3, 24), step(1), EpochDone(1, 30, 0.25, 0.125, 15.0),
    PreviewsDone(1, ["x.png"], 8.0), Exported("f.safetensors", 1, 16, 0.0, 99), RunDone("f.safetensors", "run", 90.0),
]  # fmt: skip


def test_progress_bar_prints_plan_notices_losses_and_files() -> None:
    stream = io.StringIO()
    with ProgressBar(Console(file=stream, width=200)) as bar:
        for event in EVENTS:
            bar.show(event)
    shown = stream.getvalue()
    for fact in (
        describe_plan(PLAN), "A sentence.", "epoch 1: training loss 0.25000, validation loss 0.12500",
        "16 modules, max error 0", "1 min 30 s", "f.safetensors", "run/report.html", "run/previews.png",
    ):  # fmt: skip
        assert fact in shown, fact


def test_json_lines_are_one_object_per_line() -> None:
    stream = io.StringIO()
    with JsonLines(stream) as lines:
        for event in EVENTS:
            lines.show(event)
        lines.show({"event": "planned", "job": "é"})
    found = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [row["event"] for row in found] == [
        "plan", "notice", "progress", "step", "epoch", "previews", "export", "done", "planned",
    ]  # fmt: skip
    assert found[-1]["job"] == "é"
    assert found[3]["losses"] == [0.25] * 4
