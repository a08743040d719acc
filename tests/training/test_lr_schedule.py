import math

import pytest

from sdlora.training.lr_schedule import LrSchedule, learning_rate


def rates(schedule: LrSchedule, warmup: int, total: int = 10) -> list[float]:
    return [
        learning_rate(step, total_steps=total, peak=2.0, schedule=schedule, warmup_steps=warmup)
        for step in range(1, total + 1)
    ]


def test_learning_rate_is_constant_after_a_linear_warmup() -> None:
    assert rates("constant", 0) == [2.0] * 10
    assert rates("constant", 4) == [0.5, 1.0, 1.5, 2.0, *[2.0] * 6]


def test_cosine_schedule_falls_along_half_a_cosine() -> None:
    expected = [2.0 * 0.5 * (1 + math.cos(math.pi * i / 8)) for i in range(8)]
    assert rates("cosine", 2) == pytest.approx([1.0, 2.0, *expected])
