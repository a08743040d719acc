import io
import json
from dataclasses import replace

import pytest
from preview.checks import CLEAN, COPY, check
from rich.console import Console

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
from sdlora.progress import JsonLines, ProgressBar, Timer, copy_table, describe_check, describe_plan, format_seconds

PLAN = PlanMade(
    pictures=24, heldout_pictures=8, split_off=[], repeats=10, epochs=4, exposures_per_picture=40, batch_size=4,
    gradient_accumulation_steps=2, steps=120, trained_parameters=50_000, base_parameters=5_000_000,
    targets=["cross_attention", "mlp"], device="cpu", precision="fp32",
)  # fmt: skip


def step(number: int, seconds: float = 0.5) -> StepDone:
    return StepDone(1, number, 0.25, 1e-3, ["a.png"] * 4, [1] * 4, [5] * 4, [0.25] * 4, seconds)


EVENTS: list[Event] = [
    PLAN, Notice("A sentence."), Progress("cache pictures", 3, 24), step(1), EpochDone(1, 30, 0.25, 0.125, 15.0),
    PreviewsDone(1, ["x.png"], 8.0), Exported("f.safetensors", 1, 16, 0.0, 99), RunDone("f.safetensors", "run", 90.0),
]  # fmt: skip


def test_time_left_counts_steps_and_previews() -> None:
    timer = Timer()
    timer.see(PLAN)
    timer.see(PreviewsDone(0, [], 8.0))
    assert timer.eta_seconds is None
    timer.see(step(1))
    assert timer.eta_seconds == pytest.approx(119 * 0.5 + 4 * 8.0)
    for number in range(2, 31):
        timer.see(step(number))
    timer.see(PreviewsDone(1, [], 6.0))
    assert timer.eta_seconds == pytest.approx(90 * 0.5 + 3 * 6.0)


def test_a_slower_machine_moves_the_estimate() -> None:
    timer = Timer()
    timer.see(PLAN)
    timer.see(step(1, 0.5))
    timer.see(step(2, 1.0))
    assert timer.eta_seconds == pytest.approx(118 * 0.55)


def test_people_read_the_plan_the_losses_and_where_the_file_is() -> None:
    stream = io.StringIO()
    with ProgressBar(Console(file=stream, width=200)) as bar:
        for event in EVENTS:
            bar.show(event)
    told = stream.getvalue()
    for part in (
        "24 pictures x 10 repeats x 4 epochs: every picture is seen 40 times, 120 steps of 8 pictures on cpu (fp32).",
        "Training 50,000 parameters in cross_attention, mlp, 1.00% of the base's 5,000,000", "A sentence.",
        "epoch 1: training loss 0.25000, held-out loss 0.12500", "16 modules, max error 0", "Done in 1 min 30 s",
        "run/previews.png",
    ):  # fmt: skip
        assert part in told, part
    assert describe_plan(PLAN) in told


def test_the_plan_says_what_is_held_out_and_how_to_train_on_it() -> None:
    assert "on 8 pictures of data.holdout" in describe_plan(PLAN)
    told = describe_plan(replace(PLAN, heldout_pictures=2, split_off=["a.png", "b.png"]))
    assert "2 more pictures (a.png, b.png) are not trained on" in told
    assert "data.holdout_split = false" in told
    assert "held-out" not in describe_plan(replace(PLAN, heldout_pictures=0))


def test_programs_read_one_object_a_line() -> None:
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


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (59.4, "59 s"), (185, "3 min 05 s"), (7620, "2 h 07 min")])
def test_durations(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_a_copy_check_is_told_in_one_line() -> None:
    event = CopyChecked(3, "copying", "Because.", 0.25, 0.07, 0.0027, ("a.png", "previews/p0.png"), 0.974, 9.0)
    expected = (
        "epoch 3: copying, 25% of previews match (at least 7%). Most alike: previews/p0.png and a.png, 0.97. Because."
    )
    assert describe_check(event) == expected
    assert describe_check(replace(event, epoch=0)).startswith("the base: copying")


def test_copy_checks_are_a_line_an_epoch_and_names_are_no_styles() -> None:
    stream = io.StringIO()
    odd = replace(COPY, nearest="a[red].png")
    Console(file=stream, width=200).print(copy_table({1: check("copying", CLEAN, odd), 0: check()}))
    lines = [line.split() for line in stream.getvalue().splitlines()]
    assert " ".join(lines[1]) == "base clean 0 of 2, at least 0% p0.png is 0.41 like a.png"
    assert " ".join(lines[2]).startswith("1 copying 1 of 2, at least 12% p1.png is 0.97 like a[red].png Because")


def test_the_plan_tells_sets_apart_and_what_is_trained_beside_them() -> None:
    sets = [PlannedSet("hero", 20, 10, 40), PlannedSet("town", 4, 3, 12)]
    told = describe_plan(replace(PLAN, sets=sets, preserved_pictures=50))
    assert "hero: 20 pictures x 10 repeats x 4 epochs: every picture is seen 40 times." in told
    assert "town: 4 pictures x 3 repeats x 4 epochs: every picture is seen 12 times." in told
    assert "24 pictures x 10" not in told
    assert "Beside them 50 pictures of data.preservation_folder are trained" in told
    assert "Beside them" not in describe_plan(PLAN)
