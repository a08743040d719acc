import re
from dataclasses import replace

import pytest
from helpers.checks import CLEAN, COPY, NOVEL, check, signal
from helpers.metrics import epoch, step

from sdlora.report.copy_section import copy_figures, epochs_at_a_glance, in_one_of, once_in, verdict_banner

CHECKS = {0: check(), 1: check("watch"), 2: check("copying", CLEAN, COPY)}


def test_chances_in_words() -> None:
    assert once_in(0.0027) == "once in 370"
    assert once_in(0.9) == "almost always"
    assert in_one_of(1 / 145) == "in 1 of 145 images"
    assert in_one_of(1.0) == "in most images"


@pytest.mark.parametrize(
    ("kept", "tone", "words"),
    [
        (None, "copying", "✕ Copies training images</strong><p><b>Epoch 2, the latest."),
        (1, "watch", "! First signs of copying</strong><p><b>Epoch 1, the one that is kept."),
    ],
)
def test_the_banner_speaks_of_the_epoch_that_counts(kept: int | None, tone: str, words: str) -> None:
    found = verdict_banner(CHECKS, kept)
    assert f"class='verdict {tone}'" in found and words in found
    assert f"Because it is &lt;{tone}&gt;." in found
    assert (
        "Previews no more like the set than its images are like one another are called copying about once in 370."
        in found
    )


def test_the_base_is_called_so() -> None:
    assert "✓ No copying found</strong><p><b>The base, before training.</b>" in verdict_banner({0: check()}, None)


def cells(found: str) -> list[list[str]]:
    rows = [re.findall("<td>(.*?)</td>", row) for row in re.findall("<tr>(.*?)</tr>", found)]
    return [[re.sub("<[^>]+>", "", cell) for cell in row] for row in rows if row]


def test_a_row_for_every_epoch() -> None:
    epochs = [epoch(number, validation_loss=loss) for number, loss in enumerate((0.3, 0.2, None))]
    steps = [
        step(1, ["a", "b"], [1, 2]),
        step(2, ["a", "b"], [1, 2], epoch=2),
        step(3, ["a"], [1], epoch=2),
    ]
    assert cells(epochs_at_a_glance(CHECKS, epochs, steps, 1)) == [
        ["base", "✓ clean", "0 of 2 (0%)", "0", "0.3000"],
        ["1, kept", "! watch", "0 of 2 (0%)", "1", "0.2000"],
        ["2", "✕ copying", "1 of 2 (50%)", "2 to 3", ""],
    ]


def test_an_epoch_without_a_check_keeps_its_row() -> None:
    epochs = [epoch(0), epoch(1)]
    assert cells(epochs_at_a_glance({0: check()}, epochs, [], None))[1] == ["1", "", "", "0", ""]


def test_every_signal_is_drawn_with_its_meaning() -> None:
    checks = {
        1: check("clean", self_retrieval=signal(0.02, 0.6), guidance_norm=signal(None, None)),
        2: check("clean", self_retrieval=signal(0.31, 0.02), guidance_norm=signal(None, None)),
    }
    found = copy_figures(checks)
    assert "Finds its way back to its own images" in found and ">0.31<" in found
    assert "What &lt;it&gt; means. Chance gives as much once in 50: it stands out." in found
    # The one that was never measured says why and has no axes.
    unmeasured = found.split("How hard a prompt pulls")[1]
    assert "What &lt;it&gt; means." in unmeasured and "<svg" not in unmeasured
    assert "a new one" in copy_figures({1: check("clean", a_new_one=signal(1.0, 0.5))})


def test_similarity_of_both_kinds_and_never_below_zero() -> None:
    both = copy_figures(CHECKS)
    assert both.count("<polyline") == 2 + 2 + 2
    below = copy_figures({1: check("clean", replace(NOVEL, hp_ms=-0.4))})
    assert ">captions<" not in below and "-0.4" not in below
