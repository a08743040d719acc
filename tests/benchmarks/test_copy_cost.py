"""The price of looking: counted at true shapes, and the figures that a run gives."""

from __future__ import annotations

from pathlib import Path

import copy_cost
import pytest


@pytest.mark.parametrize("preset", ["sd15-character", pytest.param("sdxl-character", marks=pytest.mark.slow)])
def test_looking_takes_at_most_a_quarter_of_the_training(preset: str) -> None:
    found = copy_cost.counted(preset)
    assert 0.1 < found["now"] <= copy_cost.MOST
    assert found["formerly"] > 1.5


@pytest.mark.slow
def test_seconds_of_a_run_are_taken(tmp_path: Path) -> None:
    found = copy_cost.timed(tmp_path, "preview.num_steps=1", "train.epochs=1", "data.repeats=1")
    assert all(found[name] > 0 for name in ("training", "scale", "previews", "check", "share"))


def test_fewer_images_are_compared_in_a_large_set() -> None:
    assert [copy_cost.num_compared(count) for count in (1, 24, 500, 1000, 100_000)] == [24, 24, 24, 12, 8]
    assert copy_cost.scale_seconds(2) > 0
