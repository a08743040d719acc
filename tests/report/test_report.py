from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from helpers.checks import CLEAN, COPY, GALLERY, check, write_epochs
from helpers.metrics import ROWS, epoch, step, write_metrics
from PIL import Image

from sdlora.common.run_files import Metrics
from sdlora.events import EpochDone, StepDone
from sdlora.report.html import Album
from sdlora.report.report import (
    coverage_figures,
    exposed_timesteps,
    largest_gap,
    loss_figures,
    loss_tables,
    write_report,
)

METRICS = Metrics(
    [row for row in ROWS if isinstance(row, StepDone)], [row for row in ROWS if isinstance(row, EpochDone)]
)


def page(folder: Path, rows: Sequence[StepDone | EpochDone], title: str = "run", kept: int | None = None) -> str:
    write_metrics(folder / "metrics.jsonl", rows)
    (folder / "config.toml").write_text('caption = "<script>alert(1)</script>"')
    write_report(folder, title, ["Epoch 1 & more."], {**GALLERY, "x.png": GALLERY["a.png"]}, kept)
    return (folder / "report.html").read_text()


def test_page_is_self_contained_and_escaped(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "previews.png")
    found = page(tmp_path, ROWS, title="<b>x")
    assert "<script>alert" not in found and "<a>" not in found
    assert "&lt;b&gt;x" in found
    assert "Epoch 1 &amp; more." in found
    assert "Least covered: &lt;a&gt;.png" in found
    assert found.count("data:image/png;base64,") == 2
    assert "http://" not in found and "https://" not in found


def test_losses_stand_in_charts_and_tables(tmp_path: Path) -> None:
    found = page(tmp_path, ROWS)
    assert "<td>0.40000</td>" in found
    assert "<tr><td>1</td><td>0.61000</td><td></td><td>0.41000</td><td></td><td>0.21000</td></tr>" in found
    # Two lines of steps, three bands of training, and twice five validation bands.
    assert found.count("<polyline") == 2 + 3 + 5 + 5


def test_page_before_training_and_without_validation_images(tmp_path: Path) -> None:
    first = page(tmp_path, ROWS[:1])
    assert "Least covered" not in first and "No preview was compared" in first
    rows = [step(1, ["x.png"], [900]), epoch(1, train_loss=0.4, train_bands=[None] * 4 + [0.4])]
    bare = page(tmp_path, rows)
    assert "alidation loss by" not in bare
    assert "0 of 1 images" in bare


def test_verdict_comes_first_and_the_grid_replaces_the_sheet(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "previews.png")
    write_epochs(tmp_path / "epochs", {0: check(), 1: check("copying", CLEAN, COPY)})
    found = page(tmp_path, ROWS)
    order = [
        "✕ Copies training images", "Epoch 1 &amp; more.", "Epoch by epoch", "Previews, epoch by epoch",
        "Nearest training images: epoch 1", "<summary>Base", "Signs of copying", "Training loss by step",
        "Settings",
    ]  # fmt: skip
    places = [found.index(part) for part in order]
    assert places == sorted(places)
    assert "contact sheet" not in found and "No preview was compared" not in found
    assert '<summary>Base <span class="chip clean">' in found
    assert "<script>alert" not in found and "<b>friends" not in found and "<it>" not in found


def test_epochs_that_the_metrics_do_not_know_are_left_out(tmp_path: Path) -> None:
    write_epochs(tmp_path / "epochs", {0: check(), 1: check(), 2: check("copying", COPY)})
    assert "Copies training images" not in page(tmp_path, ROWS)


def test_kept_epoch_is_the_one_that_is_judged(tmp_path: Path) -> None:
    write_epochs(tmp_path / "epochs", {0: check(), 1: check("watch"), 2: check("copying", COPY)})
    found = page(tmp_path, [*ROWS, epoch(2)], kept=1)
    assert "! Not settled: look at the pairs" in found and "Epoch 1, recommended" in found
    assert "<td>1, recommended</td>" in found


def test_long_run_of_large_images_stays_light(tmp_path: Path) -> None:
    rough = Image.effect_noise((1024, 1024), 60).convert("RGB")  # noise is the hardest to compress
    previews = [replace(CLEAN, seed=seed, file=f"previews/{seed}.png") for seed in range(4)]
    write_epochs(tmp_path / "epochs", {0: check("clean", *previews)})
    for match in previews:
        rough.save(tmp_path / "epochs" / "0" / match.file)
    before = len(page(tmp_path, ROWS[:1]))
    # Twelve previews of the base and five epochs: eighteen times as many.
    assert before * 18 < 15e6


def bars(chart: str) -> list[int]:
    return [int(count) for count in re.findall(r"<title>(\d+)</title>", chart)]


def test_exposures_are_counted_in_all_and_for_the_least_covered_image() -> None:
    everything, least = coverage_figures(METRICS.steps, GALLERY, Album())
    expected = [0] * 20
    for timestep in (10, 480, 990, 60):
        expected[timestep // 50] += 1
    assert bars(everything.chart) == expected
    assert "1 of 2 images" in everything.note and "800" in everything.note
    assert "<a>.png" in least.title and least.image is not None and least.image["alt"] == "<a>.png"
    assert bars(least.chart) == [1, 1] + [0] * 18
    assert "timesteps 60 to 999, after 2 exposures" in least.note


def test_gaps_include_the_edges() -> None:
    assert exposed_timesteps(METRICS.steps) == {"<a>.png": [10, 60], "b.png": [480, 990]}
    assert largest_gap([480, 990]) == (480, 990)
    assert largest_gap([990, 600]) == (0, 600)
    assert largest_gap([]) == (0, 999)


def test_losses_are_drawn_by_step_and_by_band() -> None:
    figures = loss_figures(METRICS)
    # Two lines of steps, three bands of training, and twice five validation bands.
    assert [figure.chart.count("<polyline") for figure in figures] == [2, 3, 5, 5]


def test_losses_are_listed_by_band() -> None:
    whole, *bands = loss_tables(METRICS.epochs)
    assert whole.rows[1] == ["1", "0.40000", "0.25000", "2.0"]
    rows: list[Any] = [row for table in bands for row in table.rows]
    for cells in (
        ["1", "0.61000", "", "0.41000", "", "0.21000"],
        ["base", "0.50000", "0.40000", "0.30000", "0.20000", "0.10000"],
        ["1", "-0.09000", "-0.09000", "-0.09000", "-0.09000", "-0.05000"],
    ):
        assert cells in rows


def test_run_without_validation_images_has_no_validation_figures() -> None:
    epochs = [epoch(1, train_loss=0.4, train_bands=[None] * 4 + [0.4])]
    assert len(loss_figures(replace(METRICS, epochs=epochs))) == 2 and len(loss_tables(epochs)) == 2


def test_loss_of_zero_is_drawn_on_a_linear_axis() -> None:
    zero = loss_figures(replace(METRICS, epochs=[epoch(1, train_loss=0.0, train_bands=[None] * 4 + [0.0])]))[1]
    assert zero.chart and "logarithmic" not in zero.chart
    assert "logarithmic" in loss_figures(METRICS)[1].chart
