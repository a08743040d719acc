import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from helpers.checks import CLEAN, COPY, GALLERY, check, write_epochs
from helpers.metrics import epoch, step, write_metrics
from PIL import Image

from sdlora.events import EpochDone, StepDone
from sdlora.report.report import Report, exposed_timesteps, largest_gap, write_report

ROWS = [
    epoch(0, validation_loss=0.3, validation_bands=[0.5, 0.4, 0.3, 0.2, 0.1], validation_change=[0.0] * 5),
    step(1, ["<a>.png", "b.png"], [10, 480], loss=0.5),
    step(2, ["b.png", "<a>.png"], [990, 60], loss=0.25),
    epoch(
        1, train_loss=0.4, train_bands=[0.61, None, 0.41, None, 0.21], validation_loss=0.25,
        validation_bands=[0.41, 0.31, 0.21, 0.11, 0.05], validation_change=[-0.09, -0.09, -0.09, -0.09, -0.05],
    ),
]  # fmt: skip


def page(folder: Path, rows: Sequence[StepDone | EpochDone], title: str = "run", kept: int | None = None) -> str:
    write_metrics(folder / "m.jsonl", rows)
    (folder / "c.toml").write_text('caption = "<script>alert(1)</script>"')
    report = Report(
        title, ["Epoch 1 & more."], folder / "epochs", folder / "sheet.png", folder / "m.jsonl", folder / "c.toml",
        {**GALLERY, "x.png": GALLERY["a.png"]}, kept,
    )  # fmt: skip
    write_report(folder / "r.html", report)
    return (folder / "r.html").read_text()


def bars(figure: str) -> list[int]:
    return [int(count) for count in re.findall(r"<title>(\d+)</title>", figure)]


def test_the_page_is_self_contained_and_escaped(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "sheet.png")
    found = page(tmp_path, ROWS, title="<b>x")
    assert "<script>alert" not in found and "<a>" not in found
    assert "&lt;b&gt;x" in found
    assert "Epoch 1 &amp; more." in found
    assert found.count("data:image/png;base64,") == 2
    assert "http://" not in found and "https://" not in found


def test_exposures_are_counted_in_all_and_for_the_least_covered_image(tmp_path: Path) -> None:
    found = page(tmp_path, ROWS)
    everything, least = found.split("Least covered: &lt;a&gt;.png")
    expected = [0] * 20
    for timestep in (10, 480, 990, 60):
        expected[timestep // 50] += 1
    assert bars(everything) == expected
    assert bars(least) == [1, 1] + [0] * 18
    assert "1 of 2 images never saw a timestep of 800 or more" in found
    assert "timesteps 60 to 999, after 2 exposures" in found


def test_gaps_count_the_edges() -> None:
    assert exposed_timesteps([row for row in ROWS if isinstance(row, StepDone)]) == {
        "<a>.png": [10, 60], "b.png": [480, 990],
    }  # fmt: skip
    assert largest_gap([480, 990]) == (480, 990)
    assert largest_gap([990, 600]) == (0, 600)
    assert largest_gap([]) == (0, 999)


def test_losses_stand_in_charts_and_tables(tmp_path: Path) -> None:
    found = page(tmp_path, ROWS)
    assert "<td>0.40000</td>" in found
    for cells in (
        ["1", "0.61000", "", "0.41000", "", "0.21000"],
        ["base", "0.50000", "0.40000", "0.30000", "0.20000", "0.10000"],
        ["1", "-0.09000", "-0.09000", "-0.09000", "-0.09000", "-0.05000"],
    ):
        assert "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>" in found
    # Two lines of steps, three bands of training, and twice five validation bands.
    assert found.count("<polyline") == 2 + 3 + 5 + 5


def test_before_training_and_without_held_out_images(tmp_path: Path) -> None:
    first = page(tmp_path, ROWS[:1])
    assert "Least covered" not in first and "No preview was compared" in first
    bare = page(tmp_path, [step(1, ["x.png"], [900]), epoch(1, train_loss=0.4, train_bands=[None] * 4 + [0.4])])
    assert "Validation images" not in bare and "never trained on" not in bare
    assert "0 of 1 images never saw" in bare


def test_a_loss_of_zero_is_drawn_too(tmp_path: Path) -> None:
    rows = [step(1, ["x.png"], [999]), epoch(1, train_loss=0.0, train_bands=[None] * 4 + [0.0])]
    found = page(tmp_path, rows)
    assert "Training, by noise level" in found and "logarithmic" not in found
    assert "logarithmic" in page(tmp_path, ROWS)


def test_the_verdict_comes_first_and_the_grid_replaces_the_sheet(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "sheet.png")
    write_epochs(tmp_path / "epochs", {0: check(), 1: check("copying", CLEAN, COPY)})
    found = page(tmp_path, ROWS)
    order = [
        "✕ Copies training images", "Epoch 1 &amp; more.", "Epoch by epoch", "Previews, epoch by epoch",
        "Beside the nearest training image: epoch 1", "<summary>Base", "Signs of copying", "Training, step by step",
        "Settings",
    ]  # fmt: skip
    places = [found.index(part) for part in order]
    assert places == sorted(places)
    assert "contact sheet" not in found and "No preview was compared" not in found
    assert "<summary>Base <span class='chip clean'>" in found
    assert "<script>alert" not in found and "<b>friends" not in found and "<it>" not in found


def test_epochs_that_the_metrics_do_not_know_are_left_out(tmp_path: Path) -> None:
    write_epochs(tmp_path / "epochs", {0: check(), 1: check(), 2: check("copying", COPY)})
    assert "Copies training images" not in page(tmp_path, ROWS)


def test_the_kept_epoch_is_the_one_that_is_judged(tmp_path: Path) -> None:
    write_epochs(tmp_path / "epochs", {0: check(), 1: check("watch"), 2: check("copying", COPY)})
    found = page(tmp_path, [*ROWS, epoch(2)], kept=1)
    assert "! First signs of copying</strong><p><b>Epoch 1, the one that is kept." in found
    assert "<td>1, kept</td>" in found


def test_a_long_run_of_large_images_stays_light(tmp_path: Path) -> None:
    rough = Image.effect_noise((1024, 1024), 60).convert("RGB")  # noise is the hardest to compress
    previews = [replace(CLEAN, seed=seed, file=f"previews/{seed}.png") for seed in range(4)]
    write_epochs(tmp_path / "epochs", {0: check("clean", *previews)})
    for match in previews:
        rough.save(tmp_path / "epochs" / "0" / match.file)
    before = len(page(tmp_path, ROWS[:1]))
    # Twelve previews of the base and five epochs: eighteen times as many.
    assert before * 18 < 15e6
