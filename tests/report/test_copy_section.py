import re
from dataclasses import replace
from typing import Any

import pytest
from helpers.checks import CLEAN, COPY, NOVEL, check, signal
from helpers.metrics import epoch, step

from sdlora.common.run_files import Metrics
from sdlora.copycheck.sources import CopiedImage
from sdlora.report.copy_section import copy_figures, epoch_rows, judged_epoch
from sdlora.report.html import environment

CHECKS = {0: check(), 1: check("watch"), 2: check("copying", CLEAN, COPY)}


def banner(checks: dict[int, Any], kept: int | None) -> str:
    judged = judged_epoch(checks, kept)
    return str(environment().get_template("parts.html").module.verdict_banner(checks[judged], judged, kept))  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("kept", "tone", "title", "name"),
    [
        (None, "copying", "✕ Copies training images", "Epoch 2, the latest"),
        (1, "watch", "! Not settled: look at the pairs", "Epoch 1, recommended"),
        (7, "copying", "✕ Copies training images", "Epoch 2, the latest"),
    ],
)
def test_banner_judges_the_kept_epoch_or_the_latest(kept: int | None, tone: str, title: str, name: str) -> None:
    found = banner(CHECKS, kept)
    assert f'class="verdict {tone}"' in found and title in found and name in found
    assert f"Because it is &lt;{tone}&gt;." in found and "100 runs were called copying" in found


def test_banner_before_training_names_the_base_model() -> None:
    found = banner({0: check()}, None)
    assert "✓ No copying found" in found and "The base model, before training" in found
    assert "100 runs" not in found


def cells(checks: dict[int, Any], metrics: Metrics, kept: int | None) -> list[list[str]]:
    found = str(environment().get_template("parts.html").module.glance(epoch_rows(checks, metrics, kept)))  # type: ignore[attr-defined]
    rows = [re.findall("<td>(.*?)</td>", row, re.DOTALL) for row in re.findall("<tr>(.*?)</tr>", found, re.DOTALL)]
    return [[re.sub("<[^>]+>", "", cell) for cell in row] for row in rows if row]


def test_every_epoch_has_a_row() -> None:
    epochs = [epoch(number, validation_loss=loss) for number, loss in enumerate((0.3, 0.2, None))]
    steps = [step(1, ["a", "b"], [1, 2]), step(2, ["a", "b"], [1, 2], epoch=2), step(3, ["a"], [1], epoch=2)]
    assert cells(CHECKS, Metrics(steps, epochs), 1) == [
        ["base", "✓ clean", "0 of 2", "0", "0.3000"],
        ["1, recommended", "! watch", "0 of 2 (room for 78%)", "1", "0.2000"],
        ["2", "✕ copying", "1 of 2 (room for 97%)", "2 to 3", ""],
    ]


def test_images_that_are_matched_are_named_with_their_twins_and_what_to_do() -> None:
    images = [CopiedImage("<a>.png", 3, 1, 40, ["a_crop.png"]), CopiedImage("b.png", 1, 1)]
    found = replace(check("copying", COPY), copied_images=images, advice="Keep <one>.")
    shown = str(environment().get_template("parts.html").module.copied_images(found))  # type: ignore[attr-defined]
    rows = [re.findall("<td>(.*?)</td>", row) for row in shown.split("<tr>")[2:]]
    assert rows == [["&lt;a&gt;.png", "3", "1", "2", "40", "a_crop.png"], ["b.png", "1", "1", "0", "", ""]]
    assert "Keep &lt;one&gt;." in banner({1: found}, 1)
    assert "Training images" not in str(environment().get_template("parts.html").module.copied_images(check()))  # type: ignore[attr-defined]


def test_image_without_an_exposure_counts_as_zero() -> None:
    steps = [step(1, ["a"], [1]), step(2, ["b"], [1], epoch=2)]
    rows = epoch_rows({}, Metrics(steps, [epoch(1), epoch(2)]), None)
    assert [row.exposures for row in rows] == ["0 to 1", "1"]


def test_epoch_without_a_check_keeps_its_row() -> None:
    assert cells({0: check()}, Metrics([], [epoch(0), epoch(1)]), None)[1] == ["1", "", "", "0", ""]


def test_every_signal_is_drawn_with_its_meaning() -> None:
    checks = {
        1: check("clean", self_retrieval=signal(0.02, 0.6), guidance_norm=signal(None, None)),
        2: check("clean", self_retrieval=signal(0.31, 0.02), guidance_norm=signal(None, None)),
    }
    *_, retrieval, unmeasured = copy_figures(checks)
    assert ">0.31<" in retrieval.chart
    assert retrieval.note.startswith("What <it> means.") and "0.02: significant" in retrieval.note
    # The one that was never measured says why and has no axes.
    assert (unmeasured.note, unmeasured.chart) == ("What <it> means.", "")
    assert copy_figures({1: check("clean", a_new_one=signal(1.0, 0.5))})[-1].title == "a new one"


def test_similarity_of_both_kinds_is_never_below_zero() -> None:
    both = "".join(figure.chart for figure in copy_figures(CHECKS))
    assert both.count("<polyline") == 2 + 2 + 2
    below = "".join(figure.chart for figure in copy_figures({1: check("clean", replace(NOVEL, hp_ms=-0.4))}))
    assert ">captions<" not in below and "-0.4" not in below
