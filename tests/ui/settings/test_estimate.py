"""Base models by their files alone, recipes that fit into memory, and what the studio says of a recipe."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sdlora.common.bundled import pocket_folder
from sdlora.config.toml import load_config, options, parse_config
from sdlora.errors import DataError
from sdlora.events import PlanMade
from sdlora.run.run import start
from sdlora.ui.settings import estimate, recipes
from sdlora.ui.settings.draft import Draft


@pytest.fixture
def large(tmp_path: Path) -> str:
    """The built-in base's shapes at 512 px, without weights."""
    for part in ("unet", "vae", "text_encoder"):
        content = json.loads((pocket_folder() / part / "config.json").read_text(encoding="utf-8"))
        if part == "unet":
            content["sample_size"] *= 8
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text(json.dumps(content))
    return str(tmp_path)


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Says how much memory this machine has, in bytes."""
    monkeypatch.setattr(estimate, "device_name", lambda _: "cuda:0")
    return lambda memory_bytes: monkeypatch.setattr(estimate, "usable_memory", lambda _: memory_bytes)


@pytest.mark.parametrize(("subject", "share"), [("character", 0.75), ("style", 0.6)])
def test_recipe_is_changed_to_fit_into_memory_and_back(
    subject: str, share: float, large: str, on_a_gpu: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Recipes for large bases are frugal already: here they begin where there is something to change.
    frugal = recipes.preset_options
    monkeypatch.setattr(recipes, "preset_options", lambda preset: frugal(preset) | {"train.batch_size": 2})
    on_a_gpu(1 << 40)
    answered = Draft().with_answers(subject, "as usual", large)
    needed = answered.needs()
    assert needed is not None and answered.fitted == []
    memory_bytes = int(share * needed.peak_bytes) >> 26 << 26
    on_a_gpu(memory_bytes)
    fitted = Draft().with_answers(subject, "as usual", large)
    found = fitted.needs()
    assert found is not None and found.peak_bytes <= memory_bytes
    told = estimate.describe_memory(fitted.needs(), fitted.fitted)
    assert told[0].startswith("Changed to fit") and told[-1].endswith("It fits.")
    order = [told.split(" = ")[0] for told in fitted.fitted]
    assert (
        order
        == ["train.batch_size", "base.quantization", "train.gradient_checkpointing", "data.resolution_px"][: len(order)]
        != []
    )
    on_a_gpu(1 << 40)
    assert fitted.with_answers(subject, "as usual", large).values == answered.values, "changes are undone once it fits"


def test_a_base_model_that_was_exchanged_is_counted_anew(large: str, on_a_gpu: Callable[[int], None]) -> None:
    on_a_gpu(1 << 40)
    before = Draft().with_values({"base.path": large}).needs()
    file = Path(large) / "unet" / "config.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(content | {"layers_per_block": content["layers_per_block"] + 1}))
    after = Draft().with_values({"base.path": large}).needs()
    assert before is not None and after is not None and after.peak_bytes > before.peak_bytes


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"loss.mask_floor": 0.3, "data.masks": "file"},
        {"data.class_words": [], "data.preservation_folder": "others", "train.preservation_every": 1},
    ],
)
def test_estimate_accepts_settings_that_depend_on_images(
    changes: dict[str, Any], on_a_gpu: Callable[[int], None]
) -> None:
    on_a_gpu(2**33)
    draft = Draft(values=dict(options(load_config("quickstart"))) | changes)
    found = draft.needs()
    assert found is not None and found.peak_bytes > 0


def test_base_that_cannot_fit_or_is_absent_is_reported(tiny_base: Path, on_a_gpu: Callable[[int], None]) -> None:
    on_a_gpu(0)
    draft = Draft().with_values({"base.path": str(tiny_base)})
    assert "choose a smaller base" in estimate.describe_memory(draft.needs(), draft.fitted)[-1]
    absent = draft.with_values({"base.path": "no/where"})
    assert "not on this machine" in estimate.describe_memory(absent.needs(), absent.fitted)[0]


def test_estimate_is_counted_once_while_free_memory_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[int | None] = []
    needed = Draft().needs()

    def count(_config: object, _shapes: object, memory_bytes: int | None, **_: object) -> object:
        counted.append(memory_bytes)
        return needed

    monkeypatch.setattr(estimate, "estimate_shapes", count)
    draft = Draft().with_value("lora.rank", 13)
    for memory_bytes in (2**40, 2**40 + 2**30, 2**41):
        monkeypatch.setattr(estimate, "usable_memory", lambda _, found=memory_bytes: found)
        found = draft.needs()
        assert found is not None and (found.memory_bytes, found.fits) == (memory_bytes, True)
    assert counted == [None]


@pytest.mark.parametrize(
    "values",
    [
        {"train.learning_rate": 1e-5, "train.epochs": 2, "train.exposures": 60, "train.warmup_steps": 3},
        {"preview.prompts": ["a"], "preview.seeds": [7], "preview.num_steps": 9, "preview.negative_prompt": "b"},
        {"lora.alpha": 3.0, "lora.dropout": 0.1, "loss.weighting": "min_snr", "seed": 5, "data.trigger": "zumi"},
    ],
)  # fmt: skip
def test_what_takes_no_memory_is_not_counted_anew(values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    draft = Draft().with_value("lora.rank", 13)
    needed = draft.needs()
    monkeypatch.setattr(estimate, "estimate_shapes", lambda *_, **__: pytest.fail("counted anew"))
    found = draft.with_values(values).needs()
    assert found is not None and needed is not None and found.peak_bytes == needed.peak_bytes


def test_rates_of_prodigy_are_kept_in_what_is_counted() -> None:
    assert Draft().with_values({"train.optimizer": "prodigy", "train.learning_rate": 1.0}).needs() is not None


# --- In words ---------------------------------------------------------------------------------------------------------


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


def test_folder_without_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError):
        estimate.describe_run(parse_config({"data": {"folder": str(tmp_path)}}, name="a"))


@pytest.mark.parametrize(
    ("document", "word"),
    [
        ({"train": {"learning_rate": 1.0}}, "noise"), ({"train": {"learning_rate": 1e-9}}, "hardly anything"),
        ({"data": {"repeats": 2}}, "8 times"), ({"data": {"repeats": 99}}, "396 times"),
    ],
)  # fmt: skip
def test_absurd_rates_and_lengths_are_objected_to(document: dict[str, Any], word: str) -> None:
    usual = {"data": {"folder": "x", "repeats": 25, **document.get("data", {})}}
    (told,) = estimate.warnings(parse_config(document | usual, name="a"))
    assert word in told


def test_usual_rates_are_not_objected_to() -> None:
    rates = [{"learning_rate": 3e-3}, {"optimizer": "prodigy", "learning_rate": 1.0}, {}]
    for train in rates:
        config = parse_config({"data": {"folder": "x", "repeats": 25}, "train": train}, name="a")
        assert estimate.warnings(config) == []


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
