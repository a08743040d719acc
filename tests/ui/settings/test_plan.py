"""The plan is what a run does: counted here, and by the run itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdlora.config.toml import load_config, parse_config
from sdlora.errors import DataError
from sdlora.events import PlanMade
from sdlora.run.run import start
from sdlora.ui.settings import plan


@pytest.mark.parametrize(
    "changes", [[], ["data.repeats=3", "train.gradient_accumulation_steps=2", "data.buckets=false"]]
)
def test_the_counts_are_the_runs_own(tmp_path: Path, overrides: list[str], changes: list[str]) -> None:
    file = tmp_path / "a.toml"
    file.write_text("", encoding="utf-8")
    config = load_config(str(file), [*overrides, *changes])
    made = next(event for event in start(config, tmp_path / "run") if isinstance(event, PlanMade))
    found = plan.count(config)
    assert (found.images, found.exposures, found.steps) == (made.images, made.exposures_per_image, made.steps)


def test_held_out_images_are_counted_and_told() -> None:
    config = parse_config({"data": {"folder": "builtin:zumi", "repeats": 5}}, name="a")
    found = plan.count(config)
    assert (found.images, found.validation, found.exposures, found.resolution_px) == (22, 2, 20, 64)
    told = " ".join(plan.in_words(config, found))
    for words in ("22 images", "20 times", "4 epochs", f"{found.steps} steps", "2 images are kept out"):
        assert words in told


def test_the_resolution_is_the_bases(tiny_base: Path) -> None:
    assert [plan.base_resolution_px(base) for base in ("pocket", str(tiny_base), "owner/name")] == [64, 32, 512]


def test_a_folder_that_cannot_be_trained_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError):
        plan.count(parse_config({"data": {"folder": str(tmp_path)}}, name="a"))


def test_time_and_memory_are_told_in_words() -> None:
    told = plan.measured_in_words({"seconds": 125.0, "peak_bytes": 3 * 2**30, "fits": False})
    assert "2 min 05 s" in told[0] and "3.0 GB" in told[1] and "does not fit" in told[1]
    assert plan.measured_in_words({}) == []


def test_plan_of_several_sets_uses_repeats_of_each_set(images: Path, others: Path) -> None:
    sets = [{"folder": str(images), "repeats": 2}, {"folder": str(others), "repeats": 5}]
    config = parse_config({"data": {"sets": sets}, "train": {"epochs": 3}}, name="a")
    told = " ".join(plan.in_words(config, plan.count(config)))
    assert "8 images" in told and "6 to 15 times" in told and "2 to 5 times" in told
