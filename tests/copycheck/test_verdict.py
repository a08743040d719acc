"""Verdicts on synthetic previews of known similarity."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageOps

from sdlora.copycheck.embedders import Embedders
from sdlora.copycheck.scale import Gallery, Scale, measures
from sdlora.copycheck.signals import PREVIEW_CHANGE, Signal
from sdlora.copycheck.sources import CopiedImage
from sdlora.copycheck.verdict import (
    FIDELITY,
    EpochCheck,
    Match,
    false_alarm_rate,
    judge,
    judge_base,
    match_previews,
    most_copies,
    not_learned,
    recommend,
)
from sdlora.pocket.world import random_scene, render
from sdlora.previews.sampler import PreviewRequest

REQUEST = PreviewRequest(("a caption", "another", "new", "newer"), (0, 1), "", 2, 5.0, num_captions=2)
QUIET = [Signal(name, 0.0, 0.5, "Nothing.") for name in ("one", "two", "three")]
LOUD = [Signal(name, 1.0, 0.01, "Something.") for name in ("four", "five")]


def scene(number: int) -> Image.Image:
    return render(random_scene(number))


def matches(significant: int, total: int = 8, kind: str = "training") -> list[Match]:
    return [
        Match("p", kind, 0, f"{i}.png", 0.3, 0.5, 0.009 if i < significant else 0.5, i < significant, f"{i}")  # type: ignore[arg-type]
        for i in range(total)
    ]


@pytest.fixture(scope="module")
def gallery() -> Gallery:
    return Gallery({f"{i}.png": scene(i) for i in range(12)}, {})


def checked(folder: Path, images: list[Image.Image], gallery: Gallery) -> EpochCheck:
    (folder / "previews").mkdir()
    for name, image in zip(REQUEST.file_names(), images, strict=True):
        image.save(folder / "previews" / name)
    scale = Scale(torch.empty(0, 2, dtype=torch.float64), measures(torch.ones(2), ("hp_ms", "phash")), torch.empty(0))
    return judge(match_previews(REQUEST, folder, gallery, scale, Embedders())[0], [])


def test_copies_are_found_with_their_originals(tmp_path: Path, gallery: Gallery) -> None:
    copies = [scene(3), ImageOps.mirror(scene(5)), scene(7).crop((6, 6, 60, 60))]
    check = checked(tmp_path, copies + [scene(i) for i in range(300, 305)], gallery)
    assert check.verdict == "copying"
    assert [match.nearest for match in check.previews[:3]] == ["3.png", "5.png", "7.png"]
    assert [match.significant for match in check.previews] == [True] * 3 + [False] * 5
    assert check.share == 3 / 8
    assert "3 of 8 previews" in check.reason
    assert [match.kind for match in check.previews] == ["training"] * 4 + ["novel"] * 4
    assert check.previews[1].file == "previews/prompt00_seed1.png"
    assert min(match.p_value for match in check.previews) < 1e-4


def test_other_images_of_the_same_world_are_clean(tmp_path: Path, gallery: Gallery) -> None:
    check = checked(tmp_path, [scene(i) for i in range(400, 408)], gallery)
    assert check.verdict == "clean"
    assert check.share == check.share_lower_bound == 0.0


def test_clean_says_what_it_leaves_room_for() -> None:
    assert most_copies(7) == pytest.approx(0.348, abs=1e-3)
    assert "35%" in judge(matches(0, 7), []).reason
    assert "12%" in judge(matches(0, 24), []).reason
    assert most_copies(24, 1) == pytest.approx(0.183, abs=1e-3)
    assert "18%" in judge(matches(1, 24), []).reason
    assert most_copies(3, 3) == 1


def test_one_significant_preview_is_undecided_until_24_are_drawn() -> None:
    assert judge(matches(1, 12), []).verdict == "watch"
    assert judge(matches(1, 24), []).verdict == "clean"
    assert judge(matches(2, 24), []).verdict == "watch"
    assert judge(matches(5, 24), []).verdict == "copying"


def test_base_model_never_copies() -> None:
    check = judge_base(matches(5))
    assert check.verdict == "clean" and not any(match.significant for match in check.previews)
    assert "5 of 8" in check.reason
    assert "of 8" not in judge_base(matches(0)).reason


def test_check_is_read_as_written(tmp_path: Path) -> None:
    check = replace(judge(matches(2), LOUD), copied_images=[CopiedImage("1.png", 2, 1, 20, ["twin"])], advice="Do.")
    assert EpochCheck.read(tmp_path) is None
    check.write(tmp_path)
    assert EpochCheck.read(tmp_path) == check


@pytest.mark.parametrize(
    ("significant", "signals", "verdict"),
    [
        (0, QUIET, "clean"), (0, LOUD[:1] + QUIET, "clean"), (0, LOUD, "watch"), (1, [], "watch"), (2, [], "watch"),
        (2, [], "watch"), (3, [], "copying"), (8, LOUD, "copying"),
    ],
)  # fmt: skip
def test_verdict_follows_from_previews_and_signals(significant: int, signals: list[Signal], verdict: str) -> None:
    check = judge(matches(significant), signals)
    assert check.verdict == verdict
    assert check.reason.endswith(".")
    assert set(check.signals) == {signal.name for signal in signals}


def test_reason_counts_copies_from_new_prompts() -> None:
    assert "new prompts" not in judge(matches(3), []).reason
    assert "3 of the 3 came from new prompts" in judge(matches(3, kind="novel"), []).reason
    assert "training captions" not in judge(matches(3, kind="novel"), []).reason


@pytest.mark.parametrize("total", [2, 4, 6, 7, 12, 40])
def test_false_alarm_rate_is_the_binomial_tail_of_the_fewest_copying(total: int) -> None:
    fewest = next(k for k in range(1, total + 1) if judge(matches(k, total), []).verdict == "copying")
    tail = sum(math.comb(total, k) * 0.02**k * 0.98 ** (total - k) for k in range(fewest, total + 1))
    assert false_alarm_rate(total) == pytest.approx(tail)
    assert false_alarm_rate(total) < 0.001


def check_of(significant: int) -> EpochCheck:
    return judge(matches(significant), [])


def test_recommend_takes_the_lowest_validation_loss_without_copying() -> None:
    checks = {1: check_of(0), 2: check_of(1), 3: check_of(4)}
    epoch, reason = recommend(checks, {0: 0.9, 1: 0.5, 2: 0.4, 3: 0.3}, 3)
    assert epoch == 2
    assert "validation loss, 0.40000, of 2 epochs" in reason and "epoch 3." in reason


def test_recommend_prefers_dinov2_where_enabled() -> None:
    checks = {epoch: judge(matches(0), [Signal(FIDELITY, value, None, "")]) for epoch, value in ((1, 0.7), (2, 0.6))}
    epoch, reason = recommend(checks, {1: 0.5, 2: 0.4}, 2)
    assert epoch == 1
    assert "DINOv2" in reason and "0.700, of 2 epochs" in reason


def test_recommend_takes_the_last_epoch_without_measurements() -> None:
    epoch, reason = recommend({1: check_of(0), 2: check_of(0), 3: check_of(4)}, {}, 3)
    assert epoch == 2
    assert "without validation images" in reason
    assert recommend({}, {}, 3)[0] == 3


def test_recommend_never_takes_what_comes_after_a_copying_epoch() -> None:
    checks = {1: check_of(0), 2: check_of(4), 3: check_of(1), 4: check_of(1)}
    assert recommend(checks, {1: 0.9, 2: 0.5, 3: 0.4, 4: 0.3}, 4)[0] == 1
    assert recommend(checks, {}, 4)[0] == 1
    assert recommend({1: check_of(4), 2: check_of(0)}, {1: 0.9, 2: 0.5}, 2)[0] == 2  # all copy: the fewest copies


def test_recommend_stops_before_several_previews_match_where_nothing_was_measured() -> None:
    assert recommend({1: check_of(0), 2: check_of(1), 3: check_of(2), 4: check_of(1)}, {}, 4)[0] == 2
    assert recommend({1: check_of(2), 2: check_of(2)}, {}, 2)[0] == 1
    assert recommend({1: check_of(1), 2: check_of(1)}, {}, 2)[0] == 2
    # With validation images their loss decides.
    assert recommend({1: check_of(0), 2: check_of(2)}, {1: 0.9, 2: 0.5}, 2)[0] == 2


def test_recommend_names_settings_where_every_epoch_copies() -> None:
    epoch, reason = recommend({1: check_of(5), 2: check_of(3), 3: check_of(3)}, {1: 0.1}, 3)
    assert epoch == 2
    for word in ("Every epoch copies", "more images", "data.repeats", "lora.rank", "train.learning_rate"):
        assert word in reason


def test_recommend_says_where_nothing_seems_learned() -> None:
    changed, unchanged = (judge(matches(0), [Signal(PREVIEW_CHANGE, value, None, "")]) for value in (0.4, 0.9))
    assert "learned nothing" not in recommend({1: changed}, {0: 0.6, 1: 0.5}, 1)[1]
    assert "validation loss is not below" in recommend({1: changed}, {0: 0.5, 1: 0.5}, 1)[1]
    assert "similarity 0.90" in recommend({1: unchanged}, {}, 1)[1]
    assert not_learned(None, {}, 1) == not_learned(check_of(0), {1: 0.5}, 1) == ""


def test_most_similar_has_the_lowest_p_value() -> None:
    plain = matches(0, 3)
    assert judge([plain[0], replace(plain[1], p_value=0.1), plain[2]], []).most_similar().nearest == "1.png"
    assert judge([plain[0], plain[1], replace(plain[2], hp_ms=0.9)], []).most_similar().nearest == "2.png"
