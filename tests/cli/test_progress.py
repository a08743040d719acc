import io
import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.checks import CLEAN, COPY, check
from rich.console import Console
from time_left import judged, replayed

from sdlora.cli.progress import JsonLines, ProgressBar, copy_table, describe_check, describe_plan
from sdlora.common.text import format_seconds
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
    StepRehearsed,
)
from sdlora.run.eta import Timer

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


class Replay:
    """A run by a clock of its own: what the timer said at each event, and how long the run then still took.

    Args:
        timer_of: Makes the timer, given the clock.
    """

    def __init__(self, timer_of: Callable[[Callable[[], float]], Timer] = Timer) -> None:
        self.now, self.paused = 0.0, 0.0
        self.timer = timer_of(lambda: self.now)
        self.told: list[tuple[float, float | None]] = []

    def after(self, seconds: float, *found: Event, pause: float = 0.0) -> None:
        """Events that come together, after some work; a pause counts for nobody."""
        self.now += seconds + pause
        self.paused += pause
        for event in found:
            self.timer.see(event)
        if found:
            self.told.append((self.now - self.paused, self.timer.eta_seconds))

    def wrong(self) -> list[str]:
        """What was told from a tenth of the run on that was not right."""
        found = judged(self.told)
        assert len(found) > 20
        return [str(one) for one in found if not one.right]


def replay(
    *, step_seconds: float, preview_seconds: float, export_seconds: float = 0.5,
    pauses: dict[tuple[int, str], float] | None = None, first_epoch: int = 1,
    timer_of: Callable[[Callable[[], float]], Timer] = Timer,
) -> Replay:  # fmt: skip
    """A run of 4 epochs of 30 steps, with previews, checks and exports as a run has them."""
    run, pauses, draw = Replay(timer_of), pauses or {}, random.Random(7)
    run.after(3.0, replace(PLAN, previews=8 if preview_seconds else 0))
    if first_epoch == 1:
        run.after(3 * step_seconds, StepRehearsed(step_seconds))
    for epoch in range(0 if first_epoch == 1 else first_epoch, 5):
        seconds = 0.0
        for number in range(30 * epoch - 29, 30 * epoch + 1) if epoch else ():
            one = step_seconds * draw.uniform(0.8, 1.2)
            pause = pauses.get((number, "step"), 0.0)
            seconds += one + pause
            run.after(one, pause=pause)
            if number % 5 == 0:  # losses are read back together
                read = [replace(step(n, seconds / 5), epoch=epoch) for n in range(number - 4, number + 1)]
                run.after(0.0, *read)
                seconds = 0.0
        run.after(0.3, EpochDone(epoch, 30 * epoch, 0.2, 0.2, 1.0))
        run.after(export_seconds if epoch else 0.0)
        for done in range(1, 9):
            pause = pauses.get((epoch, "preview"), 0.0) if done == 4 else 0.0
            run.after(preview_seconds / 8, Progress("previews", done, 8), pause=pause)
        run.after(0.0, PreviewsDone(epoch, [], preview_seconds))
        run.after(0.1 * preview_seconds, CopyChecked(epoch, "clean", "", 0, 0, 0, ("", ""), 0, 0.1 * preview_seconds))
        run.after(0.4, Progress("page", 1, 1))
    run.after(0.1, RunDone("f", "run", 90.0))
    return run


@pytest.mark.parametrize(
    "case",
    [
        {"preview_seconds": 0.4},
        {"preview_seconds": 18.0},  # previews and checks are 40 % of the run
        {"preview_seconds": 18.0, "export_seconds": 5.0},
        {"preview_seconds": 8.0, "pauses": {(45, "step"): 600.0}},
        {"preview_seconds": 8.0, "pauses": {(2, "preview"): 600.0}},
        {"preview_seconds": 18.0, "pauses": {(31, "step"): 60.0, (3, "preview"): 3600.0}},
    ],
)
def test_time_left_includes_previews_and_is_right_within_a_fifth_from_a_tenth_on(case: dict[str, Any]) -> None:
    assert not replay(step_seconds=1.0, **case).wrong()


@pytest.mark.parametrize("cache", ["cold", "warm"])
def test_what_real_runs_tell_is_right_within_a_fifth_from_a_tenth_on(cache: str) -> None:
    file = Path(__file__).parents[1] / "run" / "timelines" / f"quickstart_{cache}.json"
    found = judged(replayed(json.loads(file.read_text(encoding="utf-8"))))
    assert len(found) > 90
    assert not [str(one) for one in found if not one.right]


def test_previews_are_four_tenths_of_the_run_that_says_so() -> None:
    without, with_ = (replay(step_seconds=1.0, preview_seconds=seconds) for seconds in (0.0, 18.0))
    assert 1 - without.told[-1][0] / with_.told[-1][0] == pytest.approx(0.4, abs=0.06)


def test_a_run_that_goes_on_knows_what_the_ends_of_its_epochs_took() -> None:
    before = replay(step_seconds=1.0, preview_seconds=18.0).timer.closing_seconds
    assert before == pytest.approx(18.0 + 1.8 + 0.5 + 0.3 + 0.4, rel=0.05)
    again = replay(
        step_seconds=1.0, preview_seconds=18.0, first_epoch=3,
        timer_of=lambda clock: Timer(clock, closing_seconds=before),
    )  # fmt: skip
    assert not again.wrong()


def test_nothing_is_guessed_before_steps_and_images_were_timed() -> None:
    run = Replay()
    run.after(1.0, replace(PLAN, previews=8))
    run.after(2.0, StepRehearsed(0.5))
    assert run.timer.eta_seconds is None
    run.after(6.0, Progress("the base's pictures", 4, 68))
    assert run.timer.eta_seconds == pytest.approx(120 * 0.5 + 64 * 1.5 + 5 * 8 * 1.5)


def test_without_a_rehearsal_nothing_is_told_before_the_first_step() -> None:
    run = Replay()
    run.after(1.0, PLAN)
    run.after(8.0, EpochDone(0, 0, None, None, 0.0))
    run.after(1.0, Progress("page", 1, 1))
    assert run.timer.eta_seconds is None
    run.after(0.0, step(1))
    assert run.timer.eta_seconds == pytest.approx(119 * 0.5 + 4 * 9.0)


def test_people_read_the_plan_the_losses_and_where_the_file_is() -> None:
    stream = io.StringIO()
    with ProgressBar(Console(file=stream, width=200)) as bar:
        for event in EVENTS:
            bar.show(event)
    told = stream.getvalue()
    for part in (
        "24 images x 10 repeats x 4 epochs: every image is seen 40 times, 120 steps of 8 images on cpu (fp32).",
        "Training 50,000 parameters in cross_attention, mlp, 1.00% of the base's 5,000,000", "A sentence.",
        "epoch 1: training loss 0.25000, validation loss 0.12500", "16 modules, max error 0", "Done in 1 min 30 s",
        "run/previews.png",
    ):  # fmt: skip
        assert part in told, part
    assert describe_plan(PLAN) in told


def test_the_plan_says_what_is_held_out_and_how_to_train_on_it() -> None:
    assert "on 8 images of data.validation_folder" in describe_plan(PLAN)
    told = describe_plan(replace(PLAN, validation_images=2, split_off=["a.png", "b.png"]))
    assert "2 more images (a.png, b.png) are not trained on" in told
    assert "data.validation_split = false" in told
    assert "held-out" not in describe_plan(replace(PLAN, validation_images=0))


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
    told = describe_plan(replace(PLAN, sets=sets, prior_images=50))
    assert "hero: 20 images x 10 repeats x 4 epochs: every image is seen 40 times." in told
    assert "town: 4 images x 3 repeats x 4 epochs: every image is seen 12 times." in told
    assert "24 images x 10" not in told
    assert "Beside them 50 images of data.preservation_folder are trained" in told
    assert "Beside them" not in describe_plan(PLAN)
