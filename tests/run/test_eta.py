"""The time left, against runs that are replayed by a clock of their own."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from time_left import judged, replayed

from sdlora.events import (
    CopyChecked,
    EpochDone,
    Event,
    PlanMade,
    PreviewsDone,
    Progress,
    RunDone,
    StepDone,
    StepRehearsed,
)
from sdlora.run.folder import Timer

PLAN = PlanMade(
    images=24, validation_images=8, split_off=[], repeats=10, epochs=4, exposures_per_image=40, batch_size=4,
    gradient_accumulation_steps=2, steps=120, trained_parameters=50_000, base_parameters=5_000_000,
    targets=["cross_attention", "mlp"], device="cpu", precision="fp32",
)  # fmt: skip


def step(number: int, seconds: float = 0.5) -> StepDone:
    return StepDone(1, number, 0.25, 1e-3, ["a.png"] * 4, [1] * 4, [5] * 4, [0.25] * 4, seconds)


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
def test_time_left_is_within_a_fifth_after_a_tenth_of_the_run(case: dict[str, Any]) -> None:
    assert not replay(step_seconds=1.0, **case).wrong()


@pytest.mark.parametrize("cache", ["cold", "warm"])
def test_time_left_of_recorded_runs_is_within_a_fifth_after_a_tenth_of_the_run(cache: str) -> None:
    file = Path(__file__).parent / "timelines" / f"quickstart_{cache}.json"
    found = judged(replayed(json.loads(file.read_text(encoding="utf-8"))))
    assert len(found) > 45
    assert not [str(one) for one in found if not one.right]


def test_previews_of_18_seconds_are_four_tenths_of_the_run() -> None:
    without, with_ = (replay(step_seconds=1.0, preview_seconds=seconds) for seconds in (0.0, 18.0))
    assert 1 - without.told[-1][0] / with_.told[-1][0] == pytest.approx(0.4, abs=0.06)


def test_resumed_run_knows_the_seconds_of_epoch_ends() -> None:
    before = replay(step_seconds=1.0, preview_seconds=18.0).timer.closing_seconds
    assert before == pytest.approx(18.0 + 1.8 + 0.5 + 0.3 + 0.4, rel=0.05)
    again = replay(
        step_seconds=1.0, preview_seconds=18.0, first_epoch=3,
        timer_of=lambda clock: Timer(clock, closing_seconds=before),
    )  # fmt: skip
    assert not again.wrong()


def test_time_left_is_unknown_until_steps_and_images_are_timed() -> None:
    run = Replay()
    run.after(1.0, replace(PLAN, previews=8))
    run.after(2.0, StepRehearsed(0.5))
    assert run.timer.eta_seconds is None
    run.after(6.0, Progress("previews", 4, 8))
    assert run.timer.eta_seconds == pytest.approx(120 * 0.5 + 5 * 8 * 1.5)


def test_time_left_without_rehearsal_is_unknown_before_the_first_step() -> None:
    run = Replay()
    run.after(1.0, PLAN)
    run.after(8.0, EpochDone(0, 0, None, None, 0.0))
    run.after(1.0, Progress("page", 1, 1))
    assert run.timer.eta_seconds is None
    run.after(0.0, step(1))
    assert run.timer.eta_seconds == pytest.approx(119 * 0.5 + 4 * 9.0)
