"""The words for a run's plan and its copy checks."""

from __future__ import annotations

import io
from dataclasses import replace

from helpers.checks import CLEAN, COPY, check
from rich.console import Console

from sdlora.cli.describe import copy_table, describe_check, describe_plan
from sdlora.events import CopyChecked, PlanMade, PlannedSet

PLAN = PlanMade(
    images=24, validation_images=8, split_off=[], repeats=10, epochs=4, exposures_per_image=40, batch_size=4,
    gradient_accumulation_steps=2, steps=120, trained_parameters=50_000, base_parameters=5_000_000,
    targets=["cross_attention", "mlp"], device="cpu", precision="fp32",
)  # fmt: skip


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
    assert line.startswith("epoch 3: copying, 25% of previews match (at least 7%)")
    assert line.endswith("previews/p0.png and a.png, 0.97. Because.")
    assert "\n" not in line
    assert describe_check(replace(event, epoch=0)).startswith("base model: copying")


def test_copy_table_has_a_row_per_epoch_and_reads_brackets_as_text() -> None:
    stream = io.StringIO()
    odd = replace(COPY, nearest="a[red].png")
    Console(file=stream, width=200).print(copy_table({1: check("copying", CLEAN, odd), 0: check()}))
    rows = [" ".join(line.split()) for line in stream.getvalue().splitlines()]
    assert rows[1] == "base clean 0 of 2 (at least 0%) p0.png (0.41) a.png"
    assert rows[2].startswith("1 copying 1 of 2 (at least 12%) p1.png (0.97) a[red].png Because")
