"""Learning rate schedules against their formulas and against diffusers' and transformers' schedulers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.optimization import get_scheduler
from torch import nn
from transformers.optimization import get_cosine_with_min_lr_schedule_with_warmup

from sdlora.training.schedules import Schedule

TOTAL = 40


def ours(schedule: Schedule, total: int = TOTAL) -> list[float]:
    return [schedule.rate(step, total) for step in range(1, total + 1)]


def theirs(make: Callable[[torch.optim.Optimizer], Any]) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler, found = make(optimizer), []
    for _ in range(TOTAL):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize("warmup", [0, 6])
@pytest.mark.parametrize(
    ("schedule", "name", "options"),
    [
        (Schedule(2.0, "linear"), "linear", {}),
        (Schedule(2.0, "cosine"), "cosine", {}),
        (Schedule(2.0, "cosine_restarts", cycles=3), "cosine_with_restarts", {"num_cycles": 3}),
        (Schedule(2.0, "polynomial", power=2.5, floor=5e-8), "polynomial", {"power": 2.5}),
    ],
)
def test_schedules_equal_those_of_diffusers(schedule: Schedule, name: str, options: Any, warmup: int) -> None:
    made = Schedule(**{**vars(schedule), "warmup": warmup})
    expected = theirs(lambda o: get_scheduler(name, o, num_warmup_steps=warmup, num_training_steps=TOTAL, **options))
    # Theirs begins the warm-up at zero, ours ends it at the peak; from there on they are the same.
    assert ours(made)[warmup:] == pytest.approx(expected[warmup:], rel=1e-9, abs=1e-12)


def test_a_floor_equals_that_of_transformers() -> None:
    expected = theirs(lambda o: get_cosine_with_min_lr_schedule_with_warmup(o, 0, TOTAL, min_lr_rate=0.1))
    assert ours(Schedule(2.0, "cosine", floor=0.1)) == pytest.approx(expected, rel=1e-9)


def test_rex_equals_the_formula() -> None:
    expected = [2.0 * (1 - t / TOTAL) / (1 / 2 + 1 / 2 * (1 - t / TOTAL)) for t in range(TOTAL)]
    assert ours(Schedule(2.0, "rex")) == pytest.approx(expected, rel=1e-12)


def test_learning_rate_is_constant_after_a_linear_warmup() -> None:
    assert ours(Schedule(2.0), 10) == [2.0] * 10
    assert ours(Schedule(2.0, warmup=4), 10) == [0.5, 1.0, 1.5, 2.0, *[2.0] * 6]


def test_cosine_schedule_falls_along_half_a_cosine() -> None:
    expected = [2.0 * 0.5 * (1 + math.cos(math.pi * i / 8)) for i in range(8)]
    assert ours(Schedule(2.0, "cosine", warmup=2), 10) == pytest.approx([1.0, 2.0, *expected])


def test_a_warmup_below_one_is_a_share_of_all_steps() -> None:
    assert ours(Schedule(2.0, "rex", warmup=0.2)) == ours(Schedule(2.0, "rex", warmup=8))
