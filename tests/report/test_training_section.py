import re
from dataclasses import replace
from typing import Any

from helpers.checks import GALLERY
from helpers.metrics import ROWS, epoch

from sdlora.common.metrics import Metrics
from sdlora.events import EpochDone, StepDone
from sdlora.report.images import Album
from sdlora.report.training_section import (
    coverage_figures,
    exposed_timesteps,
    largest_gap,
    loss_figures,
    loss_tables,
)

METRICS = Metrics(
    [row for row in ROWS if isinstance(row, StepDone)], [row for row in ROWS if isinstance(row, EpochDone)]
)


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
