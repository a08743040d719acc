"""What the studio says of a recipe: counted here, and by the run itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdlora.config.toml import load_config, parse_config
from sdlora.errors import DataError
from sdlora.events import PlanMade
from sdlora.run.run import start
from sdlora.ui.settings import estimate


@pytest.mark.parametrize(
    "changes", [[], ["data.repeats=3", "train.gradient_accumulation_steps=2", "data.buckets=false"]]
)
def test_counts_are_those_of_the_run(tmp_path: Path, overrides: list[str], changes: list[str]) -> None:
    file = tmp_path / "a.toml"
    file.write_text("", encoding="utf-8")
    config = load_config(str(file), [*overrides, *changes])
    made = next(event for event in start(config, tmp_path / "run") if isinstance(event, PlanMade))
    told = " ".join(estimate.describe_run(config))
    assert f"{made.images} images" in told and f"seen {made.exposures_per_image} times" in told
    assert f"{made.steps} steps of {made.batch_size * made.gradient_accumulation_steps} image" in told


def test_validation_images_are_counted_and_described() -> None:
    config = parse_config({"data": {"folder": "builtin:zumi", "repeats": 5}}, name="a")
    told = " ".join(estimate.describe_run(config))
    for fact in ("22 images at 64 px", "20 times", "5 times in each of 4 epochs", "2 images are kept out"):
        assert fact in told


def test_resolution_is_the_base_models(tiny_base: Path) -> None:
    assert [estimate.base_resolution_px(base) for base in ("pocket", str(tiny_base), "owner/name")] == [64, 32, 512]


def test_folder_without_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError):
        estimate.describe_run(parse_config({"data": {"folder": str(tmp_path)}}, name="a"))


def test_measured_time_and_memory_are_described() -> None:
    changes = [{"change": "lora.rank = 4"}]
    measured = {"seconds": 125.0, "peak_bytes": 3 * 2**30, "fits": False, "changes": changes}
    told = estimate.describe_measured(measured)
    for fact, line in zip(("2 min 05 s", "3.00 GiB", "lora.rank = 4"), told, strict=True):
        assert fact in line
    assert estimate.describe_measured({}) == []


def test_counts_of_several_sets_use_repeats_of_each_set(images: Path, others: Path) -> None:
    sets = [{"folder": str(images), "repeats": 2}, {"folder": str(others), "repeats": 5}]
    config = parse_config({"data": {"sets": sets}, "train": {"epochs": 3}}, name="a")
    told = " ".join(estimate.describe_run(config))
    assert "8 images" in told and "6 to 15 times" in told and "2 to 5 times" in told
