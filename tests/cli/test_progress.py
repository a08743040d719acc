"""The progress bar with its words for a run's plan and its copy checks, and JSON lines."""

from __future__ import annotations

import io
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.checks import CLEAN, COPY, check
from rich.console import Console

from sdlora.cli.progress import JsonLines, ProgressBar, copy_table, describe_check, describe_plan
from sdlora.events import (
    CopyChecked,
    EpochDone,
    Event,
    Exported,
    Notice,
    PlanMade,
    PlannedSet,
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


def test_progress_bar_prints_plan_notices_losses_and_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run").mkdir()
    Path("run/previews.png").touch()
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


def test_previews_are_told_only_where_there_are_some(tmp_path: Path) -> None:
    console = Console(file=io.StringIO())
    with ProgressBar(console) as bar:
        bar.show(RunDone("f.safetensors", str(tmp_path), 90.0))
    assert isinstance(console.file, io.StringIO)
    said = console.file.getvalue()
    assert "report.html" in said and "previews.png" not in said


def test_events_that_nobody_reads_stop_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream, JsonLines(stream) as lines:
        for event in EVENTS:
            lines.show(event)
    assert capsys.readouterr().err == "Events are no longer printed (Broken pipe); the run continues.\n"
    with open("/dev/full", "w", encoding="utf-8") as full, JsonLines(full) as lines:  # noqa: PTH123
        lines.show(EVENTS[0])
    assert "No space left" in capsys.readouterr().err


def test_a_closed_terminal_stops_nothing() -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(5, "Input/output error")

    with ProgressBar(Console(file=Gone(), width=200)) as bar:
        for event in EVENTS:
            bar.show(event)


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


def test_plan_names_exposures_steps_and_parameters() -> None:
    text = describe_plan(PLAN)
    for fact in ("24 images x 10 repeats x 4 epochs", "40 times", "120 steps of 8 images on cpu (fp32)",
                 "50,000 parameters in cross_attention, mlp", "1.00%", "5,000,000"):  # fmt: skip
        assert fact in text, fact


def test_plan_names_validation_images_and_the_option_to_train_on_them() -> None:
    assert "8 images of data.validation_folder" in describe_plan(PLAN)
    text = describe_plan(replace(PLAN, validation_images=2, split_off=["a.png", "b.png"]))
    assert "2 more images (a.png, b.png)" in text
    assert "data.validation_split = false" in text
    assert "validation" not in describe_plan(replace(PLAN, validation_images=0))


def test_plan_of_several_sets_names_each_and_the_prior_images() -> None:
    sets = [PlannedSet("hero", 20, 10, 40), PlannedSet("town", 4, 3, 12)]
    text = describe_plan(replace(PLAN, sets=sets, prior_images=50))
    assert "hero: 20 images x 10 repeats x 4 epochs: each image is seen 40 times." in text
    assert "town: 4 images x 3 repeats x 4 epochs: each image is seen 12 times." in text
    assert "24 images x 10" not in text
    assert "50 images of data.preservation_folder" in text
    assert "preservation" not in describe_plan(PLAN)


def test_copy_check_is_one_line_with_the_most_similar_pair() -> None:
    event = CopyChecked(3, "copying", "Because.", 0.25, 0.07, 0.0027, ("a.png", "previews/p0.png"), 0.974, 9.0)
    line = describe_check(event)
    assert line.startswith("epoch 3: copying. ")
    assert line.endswith("Because. Most similar: previews/p0.png and a.png, 0.97.")
    assert "\n" not in line
    assert describe_check(replace(event, epoch=0)).startswith("base model: copying")


def test_copy_table_has_a_row_per_epoch_and_reads_brackets_as_text() -> None:
    stream = io.StringIO()
    odd = replace(COPY, nearest="a[red].png")
    Console(file=stream, width=200).print(copy_table({1: check("copying", CLEAN, odd), 0: check()}))
    rows = [" ".join(line.split()) for line in stream.getvalue().splitlines()]
    assert rows[1] == "base clean 0 of 2 p0.png (0.41) a.png"
    assert rows[2].startswith("1 copying 1 of 2 (room for 97%) p1.png (0.97) a[red].png Because")
