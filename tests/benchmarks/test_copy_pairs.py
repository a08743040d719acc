"""The copy check's ground truth: its families are what they say, its figures are right by hand, its program runs."""

from __future__ import annotations

import json
import math
import random
import sys
from pathlib import Path

import copy_pairs
import copy_sets
import numpy as np
import pytest
import torch
from copy_sets import CAPTION, FAMILIES, RECOMPOSED, SAME, UNRELATED, Group
from estimates import clopper_pearson
from PIL import Image, ImageOps

from sdlora.pocket.world import random_scene, render


@pytest.fixture(scope="module")
def groups() -> list[Group]:
    return [group for group in copy_sets.world_groups() if group.subject in ("zumi", "blueprint", "creature 2")]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Six subjects with five photographs each, one of them twice, mirrored the second time; one lies beside."""
    folder = tmp_path / "photos"
    for number in range(30):
        image = render(random_scene(number)).resize((120, 90))
        (folder / f"subject{number % 6}").mkdir(parents=True, exist_ok=True)
        image.save(folder / f"subject{number % 6}" / f"{number:02d}.png")
    ImageOps.mirror(image).save(folder / "subject5" / "99.png")
    image.rotate(90).save(folder / "tower_01.png")
    return folder


def _pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=float)


def test_intervals_are_clopper_and_pearsons() -> None:
    # All of n succeed: 0.025 ** (1 / n). 81 of 263: Newcombe 1998, table I, method 5, .2527 to .3676.
    assert clopper_pearson(10, 10) == pytest.approx((1.0, 0.025 ** (1 / 10), 1.0))
    assert clopper_pearson(0, 300) == pytest.approx((0.0, 0.0, 1 - 0.025 ** (1 / 300)))
    assert clopper_pearson(81, 263) == pytest.approx((81 / 263, 0.2527, 0.3676), abs=1e-4)
    assert clopper_pearson(20, 4000).high < 0.008  # no overflow


def test_copies_differ_as_their_family_says(groups: list[Group]) -> None:
    image = groups[0].gallery[0]
    assert FAMILIES["exact"](image, random.Random(0)) is image
    assert FAMILIES["flip"](image, random.Random(0)).tobytes() == ImageOps.mirror(image).tobytes()
    bent = FAMILIES["warp"](image, random.Random(0))
    assert 2 < np.abs(_pixels(bent) - _pixels(image)).mean() < 30
    still = copy_sets.warp(image, random.Random(0), reach=0.0)
    assert np.abs(_pixels(still) - _pixels(image)).max() <= 1
    for group in groups:
        assert group.copy("crop 60", 5).tobytes() == group.copy("crop 60", 5).tobytes()
        assert group.copy("crop 60", 5).tobytes() != group.copy("crop 60", 5 + group.own).tobytes()
        assert 2 < np.abs(_pixels(group.copy("exact", 3)) - _pixels(group.gallery[3])).mean() < 30


def test_a_recomposed_subject_stays_as_it_was(groups: list[Group]) -> None:
    zumi = groups[0]
    assert zumi.recomposed is not None
    first, second, own = (_pixels(p) for p in (zumi.recomposed(0, 0), zumi.recomposed(0, 1), zumi.gallery[0]))
    shared = (first == own).all(axis=2) & (second == own).all(axis=2)
    assert 0.02 < shared.mean() < 0.5
    assert groups[1].recomposed is None
    assert zumi.gallery[0].tobytes() == copy_sets.world_groups()[0].gallery[0].tobytes()


def test_what_is_no_copy_is_not_in_the_gallery(groups: list[Group]) -> None:
    for group in groups:
        known = {image.tobytes() for image in group.gallery}
        for tier in (CAPTION, SAME, UNRELATED):
            drawn = [image.tobytes() for image in group.others[tier](30)]
            assert len(set(drawn)) == 30
            assert not known & set(drawn)


def test_photographs_are_halved_and_their_duplicates_left_out(photos: Path, tmp_path: Path) -> None:
    found, num_left_out = copy_sets.photo_groups([photos])
    assert num_left_out == 1
    assert sorted({group.subject for group in found}) == [f"photos/subject{number}" for number in range(6)]
    assert [group.own for group in found[:2]] == [3, 2]
    in_turn, _ = copy_sets.photo_groups([photos], mixed=True)
    assert [group.own for group in in_turn[:2]] == [2, 3]
    named = [found[1].gallery[0], found[1].gallery[1], *found[1].others[SAME](9)]
    assert [p.tobytes() for p in in_turn[1].gallery[:3]] == [named[place].tobytes() for place in (0, 2, 4)]
    for group in found:
        assert len(group.gallery) == copy_sets.GALLERY
        others = [p.tobytes() for tier in (SAME, UNRELATED) for p in group.others[tier](99)]
        assert len(group.gallery) + len(others) == 31
        assert not {image.tobytes() for image in group.gallery} & set(others)
        assert group.copy(RECOMPOSED, 0).size == (copy_sets.PHOTO_PX, copy_sets.PHOTO_PX)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="at least 25 and two"):
        copy_sets.photo_groups([tmp_path / "empty"])


def test_thresholds_come_from_other_subjects() -> None:
    """a's own null is far below b's, so that a is held to b's threshold and b to a's."""
    low, high = torch.arange(100.0).double() / 1000, 1 + torch.arange(100.0).double() / 1000
    scores = {
        SAME: {"a": torch.stack([low, low], dim=1), "b": torch.stack([high, high], dim=1)},
        "exact": {"a": torch.full((4, 2), 1.0505).double(), "b": torch.full((4, 2), 0.5).double()},
    }
    found = copy_pairs.find(scores, "exact", "hp_ms", SAME)
    assert found.num == 8
    # a's 1.0505 is above 51 of b's null, b's 0.5 above all of a's.
    assert found.auc == pytest.approx((0.51 + 1.0) / 2)
    assert found.at[0.01].value == 0.5


@pytest.mark.parametrize(("num", "rate"), [(368, 0.01), (400, 0.05), (900, 0.01)])
def test_a_threshold_leaves_a_margin(num: int, rate: float) -> None:
    """At the rate itself so few would be seen in one of forty nulls at most, and one more would not."""
    seen = copy_pairs.most_above(num, rate)
    at_most = [
        sum(math.comb(num, k) * rate**k * (1 - rate) ** (num - k) for k in range(most + 1)) for most in (seen, seen + 1)
    ]
    assert at_most[0] <= 0.025 < at_most[1]
    assert copy_pairs.most_above(367, 0.01) == copy_pairs.most_above(20, 0.01) == 0


def test_the_score_that_stands_out_counts() -> None:
    null = torch.arange(101.0).double()[:, None] * torch.tensor([1.0, 2.0, 0.0])  # to the 95th percentile: 45 and 90
    seen = torch.tensor([[185.0, 0.0, 9.0], [0.0, 460.0, 9.0]]).double()
    assert copy_pairs.STATISTICS["hp_ms or phash"](seen, null).tolist() == [3.0, 4.0]
    steps = torch.tanh(torch.arange(101.0).double()[:, None] / 100 * torch.tensor([1.0, 0.0, 2.0]))  # even, by Fisher
    seen = torch.tensor([[1.85, 0.0, 0.0], [0.0, 9.0, 2.8]]).double().tanh()
    found = copy_pairs.STATISTICS["hp_ms or registered"](seen, steps).tolist()
    assert found == pytest.approx([3.0, 2.0])


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_small_run_with_a_base(groups: list[Group], tiny_base: Path, tmp_path: Path) -> None:
    kept = tmp_path / "scores.pt"
    scores = copy_pairs.score(groups[1:], 2, tiny_base, kept)
    assert set(scores) == {*FAMILIES, RECOMPOSED, *copy_pairs.TIERS, copy_pairs.VAE,
                           *(f"img2img 0.{tenth}" for tenth in range(1, 10))}  # fmt: skip
    assert {kind: sum(map(len, of.values())) for kind, of in scores.items()}[SAME] == 12
    first = torch.load(kept)[:1]
    first[0][SAME] += 1  # of the first group what is kept counts, the second is made anew
    torch.save(first, kept)
    again = copy_pairs.score(groups[1:], 2, tiny_base, kept)
    scores[SAME][groups[1].subject] += 1
    assert all(torch.equal(scores[kind][name], again[kind][name]) for kind in scores for name in scores[kind])


@pytest.mark.slow
@pytest.mark.exhaustive
def test_the_program_fills_its_page(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = Path(__file__).parents[2] / "docs" / "measurements" / "copy-check.md"
    (tmp_path / "copy-check.md").write_text(page.read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(copy_sets, "PHOTO_PX", 64)
    more = tmp_path / "more"
    for number in range(5):
        (more / f"scene{number % 2}").mkdir(parents=True, exist_ok=True)
        render(random_scene(100 + number)).save(more / f"scene{number % 2}" / f"{number}.png")
    command = ["copy_pairs.py", "--photos", str(photos), str(more), "--name", "packages", "--num", "6", "--json"]
    monkeypatch.setattr(sys, "argv", [*command, "--docs", str(tmp_path)])
    copy_pairs.main()
    num = {(row["kind"], row["statistic"]): row["num"] for row in json.loads(capsys.readouterr().out)}
    assert {statistic for _, statistic in num} == set(copy_pairs.STATISTICS)
    folders = [num[kind, "hp_ms"] for kind in (SAME, f"{SAME}, photos", f"{SAME}, more")]
    assert folders == [35, 30, 5]
    text = (tmp_path / "copy-check.md").read_text(encoding="utf-8")
    filled = text[text.index("<!-- packages: begin -->") : text.index("<!-- packages: end -->")]
    assert "8 subjects, 1 near-duplicates left out" in filled
    assert "| exact | 16 | 1.000 |" in filled
    assert "| same subject, more | 5 |" in filled
