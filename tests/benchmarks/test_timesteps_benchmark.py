"""The timestep benchmarks' statistics against numbers made by hand, and miniature runs of each program."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradient_noise
import pytest
import results
import setting
import timesteps
import timesteps_report
import torch
from classifier import Judge
from concepts import CONCEPTS, FEW, NUM_FEW, NUM_TRAINING, NUM_VALIDATION, write_all
from estimates import (
    Estimate,
    copies_at_fidelity,
    copies_saved,
    expected_gain,
    noise_ratio,
    paired_interval,
    steps_to_reach,
)
from PIL import Image

# --- Statistics ----------------------------------------------------------------------------------------------------


def test_the_interval_is_students() -> None:
    # 1, 2, 3: mean 2, deviation 1, t(2) = 4.303, so that the reach is 4.303 / sqrt(3).
    found = paired_interval([1.0, 2.0, 3.0])
    assert found == pytest.approx((2.0, 2.0 - 2.4843, 2.0 + 2.4843), abs=1e-3)
    with pytest.raises(ValueError, match="at least two"):
        paired_interval([1.0])


def test_steps_to_reach_are_read_between_points() -> None:
    curve = [(0, 1.0), (12, 0.5), (24, 0.4), (36, 0.45)]
    assert steps_to_reach(curve, 0.45) == pytest.approx(18.0)
    assert steps_to_reach(curve, 0.5) == pytest.approx(12.0)
    assert steps_to_reach(curve, 1.5) == 0.0
    assert steps_to_reach(curve, 0.39) is None


def test_noise_ratio_of_independent_gradients() -> None:
    """Mean (2, 0, ...), unit noise in 10 dimensions: tr Cov = 10, |E g|^2 = 4, ratio 2.5; halved in batches of two."""
    draw = torch.Generator().manual_seed(0)
    mean = torch.zeros(10, dtype=torch.float64)
    mean[0] = 2.0
    gradients = mean + torch.randn(2400, 10, generator=draw, dtype=torch.float64)
    plans = [index // 8 for index in range(2400)]
    found = noise_ratio(gradients @ gradients.T, plans)
    for estimate in found.values():
        assert estimate.value == pytest.approx(2.5, rel=0.08)
        assert estimate.low < 2.5 < estimate.high
    pairs = gradients.view(-1, 2, 10).mean(dim=1)
    halved = noise_ratio(pairs @ pairs.T, [index // 8 for index in range(1200)])
    assert halved["batch"].value == pytest.approx(1.25, rel=0.1)


def test_noise_ratio_is_the_unbiased_estimator() -> None:
    """One gradient per plan: the textbook's covariance, and |mean|^2 less what noise adds to it."""
    gradients = torch.tensor([[1.0, 0.0], [3.0, 1.0], [2.0, 5.0]], dtype=torch.float64)
    trace = gradients.var(dim=0, correction=1).sum()
    expected = trace / (gradients.mean(dim=0).square().sum() - trace / 3)
    found = noise_ratio(gradients @ gradients.T, [0, 1, 2])
    assert found["batch"].value == pytest.approx(float(expected))
    assert found["window"].value == pytest.approx(float(expected))


def test_batches_that_make_up_for_one_another_are_seen_in_the_window_only() -> None:
    draw = torch.Generator().manual_seed(0)
    noise = torch.randn(500, 1, 4, generator=draw, dtype=torch.float64)
    gradients = (1.0 + torch.cat([noise, -noise], dim=1)).flatten(0, 1)
    found = noise_ratio(gradients @ gradients.T, [index // 2 for index in range(1000)])
    assert found["batch"].value == pytest.approx(1.0, rel=0.15)
    assert abs(found["window"].value) < 0.01
    with pytest.raises(ValueError, match="same number"):
        noise_ratio(torch.eye(3, dtype=torch.float64), [0, 0, 1])


def test_the_expected_gain_is_what_stratified_batches_measure() -> None:
    """Two bins with means (3, 0) and (0, 1) and unit noise in 2 dimensions, batches of one from either bin."""
    means = torch.tensor([[3.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    draw = torch.Generator().manual_seed(0)
    chosen = torch.randint(2, (1000,), generator=draw)
    singles = means[chosen] + torch.randn(1000, 2, generator=draw, dtype=torch.float64)
    bins = torch.nn.functional.one_hot(chosen, 2).double()
    plans = [index // 10 for index in range(1000)]
    apart = torch.tensor([[0.0, 0.5], [0.5, 0.0]], dtype=torch.float64)
    found = expected_gain(singles @ singles.T, bins, plans, apart, 2)
    noise = torch.randn(40000, 2, 2, generator=draw, dtype=torch.float64)
    stratified = (means + noise).mean(dim=1)
    by_chance = (means[torch.randint(2, (40000, 2), generator=draw)] + noise).mean(dim=1)
    measured = float(by_chance.var(dim=0).sum() / stratified.var(dim=0).sum())
    assert found.low < measured < found.high
    assert found.value == pytest.approx(measured, rel=0.1)
    evenly = torch.full((2, 2), 0.25, dtype=torch.float64)
    assert expected_gain(singles @ singles.T, bins, plans, evenly, 2).value == pytest.approx(1.0)


def test_meetings_are_those_of_the_plan() -> None:
    def quarters(coverage: str) -> torch.Tensor:
        return gradient_noise.meetings(coverage, 4, num_seeds=20).view(4, 5, 4, 5).sum(dim=(1, 3))

    assert (quarters("none") - 1 / 16).abs().max() < 0.008
    # Four exposures of a step have a quarter each, or nearly.
    assert quarters("image").diagonal().sum() < 0.05


def test_copies_are_compared_at_equal_fidelity() -> None:
    reference = [(0.4, 0.1), (0.8, 0.3), (1.0, 0.5)]
    variant = [(0.4, 0.0), (0.6, 0.1), (0.9, 0.2)]
    assert copies_at_fidelity(reference, 0.9) == pytest.approx(0.4)
    assert copies_at_fidelity(reference, 0.2) == pytest.approx(0.05)
    with pytest.raises(ValueError, match="ends below"):
        copies_at_fidelity(variant, 1.0)
    # At 0.9, the lower of both tops: 0.2 against 0.4; every resample of equal pairs says the same.
    assert copies_saved([(reference, variant)] * 3) == pytest.approx((-0.2, -0.2, -0.2))


# --- Concepts and results ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("concepts")
    write_all(folder)
    return folder


@pytest.mark.parametrize("name", CONCEPTS)
def test_concepts_are_written_like_the_sample_sets(name: str, sets: Path) -> None:
    concept = CONCEPTS[name]
    assert len(list((sets / name).glob("*.png"))) == NUM_TRAINING
    assert len(list((sets / name / FEW).glob("*.png"))) == NUM_FEW
    assert len(list((sets / name / "holdout").glob("*.txt"))) == NUM_VALIDATION
    captions = concept.training_captions()
    assert all(name in caption for caption in captions)
    assert not set(concept.prompts(30)) & set(captions)
    own, fresh = concept.draw(3, 0), concept.draw(3, 1)
    assert own[1] == fresh[1]
    assert own[0].tobytes() != fresh[0].tobytes()


@pytest.mark.parametrize("name", ["zumi", "blueprint"])
def test_shipped_sets_are_the_shipped_ones(name: str, sets: Path) -> None:
    shipped = Path(__file__).parents[2] / "datasets" / name
    for file in shipped.rglob("*.png"):
        written = sets / name / file.relative_to(shipped)
        assert Image.open(written).tobytes() == Image.open(file).convert("RGB").tobytes()
        assert written.with_suffix(".txt").read_text() == file.with_suffix(".txt").read_text()


def test_finished_cells_are_not_measured_again(tmp_path: Path) -> None:
    file, asked = tmp_path / "results.jsonl", []

    def measure(cell: results.Cell) -> dict[str, Any]:
        asked.append(cell["seed"])
        return {"loss": cell["seed"] / 2}

    lines: list[str] = []
    results.run_missing(file, [{"seed": 0}, {"seed": 1}], measure, show=lines.append)
    results.run_missing(file, [{"seed": 1}, {"seed": 2}], measure, show=lines.append)
    assert asked == [0, 1, 2]
    assert [row["loss"] for row in results.read(file)] == [json.loads(line)["loss"] for line in lines] == [0, 0.5, 1]


def test_processes_share_all_cells() -> None:
    cells = timesteps.all_cells(["loss", "copy"], [0, 1, 2])
    assert len(cells) == 3 * 4 * (14 + 6)
    first, second = results.share(cells, "0/2"), results.share(cells, "1/2")
    assert sorted(map(str, first + second)) == sorted(map(str, cells))
    with pytest.raises(ValueError, match="0/2"):
        results.share(cells, "2/2")


# --- Miniature runs ------------------------------------------------------------------------------------------------

SMALL = timesteps.Scale(
    rank=2, repeats=1, point_steps=5, copy_rank=4, copy_repeats=1, num_images=3, num_steps=2, strangers=2
)


@pytest.fixture
def bench(tiny_base: Path, sets: Path) -> timesteps.Bench:
    torch.manual_seed(0)
    return timesteps.Bench(str(tiny_base), sets, SMALL, Judge().eval())


def test_a_small_loss_cell(bench: timesteps.Bench) -> None:
    found = bench.measure({"part": "loss", "concept": "kolo", "seed": 0, "variant": "image"})
    steps = [step for step, _ in found["curve"]]
    assert steps == [0, 5, 6, 10, 12, 15, 18, 20, 24]
    assert all(len(bands) == 5 and min(bands) > 0 for _, bands in found["curve"])
    assert found["curve"][0] != found["curve"][-1]
    assert 0 < found["planning_seconds"] < found["step_seconds"]


def test_a_small_copy_cell(bench: timesteps.Bench) -> None:
    found = bench.measure({"part": "copy", "concept": "mirba", "seed": 0, "variant": "none"})
    assert [epoch["epoch"] for epoch in found["epochs"]] == [1, 2, 3, 4]
    assert all(
        len(epoch["scores"]) == len(epoch["stranger_scores"]) == 3 and 0 <= epoch["fidelity"] <= 1
        for epoch in found["epochs"]
    )


def test_bands_are_of_the_base_and_not_of_the_seed(tiny_base: Path, sets: Path, tmp_path: Path) -> None:
    made = [
        setting.prepare(setting.make_config(str(tiny_base), sets, "kolo", seed, setting.recipe(2, 1)), tmp_path / "run")
        for seed in (0, 1)
    ]
    first, second = (setting.validation(parts) for parts in made)
    assert first == second
    assert len(first) == 5


def test_small_gradients_leave_the_adapter_as_it_is(tiny_base: Path, sets: Path, tmp_path: Path) -> None:
    parts = gradient_noise.warm_parts(str(tiny_base), sets, "kolo", tmp_path / "run", repeats=1)
    before = [parameter.detach().clone() for parameter in parts.adapter.parameters()]
    assert any(bool(parameter.detach().any()) for parameter in parts.adapter.up_parameters())
    levels = gradient_noise.measure_levels(parts, num_plans=3, num_batches=4)
    assert (levels["num_gradients"], set(levels["gains"])) == (12, {"batch", "image"})
    found = gradient_noise.measure(parts, 2, "none", num_plans=3, num_batches=2)
    assert found["num_gradients"] == 6
    assert all(len(found[kind]) == 3 for kind in ("batch", "window"))
    for old, new in zip(before, parts.adapter.parameters(), strict=True):
        assert torch.equal(old, new)
    again = [gradient_noise.plan_gradients(parts, parts.config, 2) for _ in range(2)]
    assert torch.equal(again[0][0], again[1][0])
    assert again[0][1] == again[1][1]
    assert [len(step) for step in again[0][1]] == [4, 4]


# --- The page ------------------------------------------------------------------------------------------------------


def _rows() -> list[dict[str, Any]]:
    """Results of two concepts, made up so that the tables can be told by hand."""
    rows: list[dict[str, Any]] = []
    for number, concept in enumerate(("kolo", "mirba")):
        for variant, last, score in (("none", 1.0, 0.9), ("image", 0.9 + 0.02 * number, 0.7)):
            cell = {"concept": concept, "seed": 0, "variant": variant}
            curve = [[0, [2.0] * 5], [10, [last] * 5]]
            rows.append({"cell": {"part": "loss", **cell}, "curve": curve, "step_seconds": 0.1,
                         "planning_seconds": 0.0001})  # fmt: skip
            epochs = [{"epoch": 1, "fidelity": 0.5, "scores": [score, 0.1], "stranger_scores": [0.8, 0.8],
                       "bands": [last] * 5}]  # fmt: skip
            rows.append({"cell": {"part": "copy", **cell}, "epochs": epochs})
        gains = {coverage: {"4": [1.1 + number, 1.0, 2.2]} for coverage in ("batch", "image")}
        rows.append({"cell": {"part": "levels", "concept": concept}, "gains": gains})
        for coverage, value in (("none", 8.0), ("batch", 4.0), ("image", 2.0)):
            cell = {"part": "noise", "concept": concept, "batch_size": 4, "coverage": coverage}
            rows.append({"cell": cell, "batch": [value, 1.0, 9.0], "window": [value, 1.0, 9.0]})
    return rows


def test_tables_say_what_the_results_do() -> None:
    rows = _rows()
    assert timesteps_report.loss_changes(timesteps_report.runs(rows, "loss"), "image")[0].value == pytest.approx(-9.0)
    (line,) = timesteps_report.loss_table(rows)[2:]
    # 2 to 1 in ten steps is reached on the way to 0.9 after 10/1.1 steps, on the way to 0.92 after 10/1.08.
    assert line.startswith("| `image` | 2 | -9.00 (") and "| 0.92 | 0 |" in line
    assert timesteps_report.noise_table(rows)[2] == (
        "| kolo | 4 | 8.0 (1.0 to 9.0) | 4.0 (1.0 to 9.0) | 2.0 (1.0 to 9.0) |"
    )
    assert timesteps_report.levels_table(rows)[3] == ("| mirba | 4 | 2.100 (1.000 to 2.200) | 2.100 (1.000 to 2.200) |")
    copies = timesteps_report.copies_table(rows)[2:]
    assert "50% / 50%" in copies[0] and "50% / 0%" in copies[1]
    assert "-50.0 (-50.0 to -50.0) | -50.0 (-50.0 to -50.0)" in copies[1]
    assert "0.100%" in timesteps_report.overhead_table(rows)[2]


@pytest.mark.parametrize("make", [_rows, list], ids=["with results", "without"])
def test_the_page_is_filled(make: Callable[[], list[dict[str, Any]]], tmp_path: Path) -> None:
    page = Path(__file__).parents[2] / "docs" / "measurements" / "timesteps.md"
    (tmp_path / "timesteps.md").write_text(page.read_text(encoding="utf-8"), encoding="utf-8")
    file = tmp_path / "results.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in make()), encoding="utf-8")
    timesteps_report.write(file, tmp_path)
    once = (tmp_path / "timesteps.md").read_text(encoding="utf-8")
    timesteps_report.write(file, tmp_path)
    assert (tmp_path / "timesteps.md").read_text(encoding="utf-8") == once
    assert ("Not measured yet" in once) == (not make())
    plots = {path.name for path in tmp_path.glob("*.svg")}
    assert plots == ({"timesteps_levels.svg", "timesteps_loss.svg", "timesteps_copies.svg"} if make() else set())
    with pytest.raises(ValueError, match="once each"):
        timesteps_report.between(once, "nothing", "")


def test_estimates_print_their_sign() -> None:
    assert timesteps_report._signed(Estimate(-1.0, -2.0, 0.5)) == "-1.0 (-2.0 to +0.5)"
