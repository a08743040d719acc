import re
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.checks import CLEAN, COPY, GALLERY, NOVEL, check, write_epochs
from PIL import ImageOps

from sdlora.report.comparisons import Comparisons
from sdlora.report.images import Album

CHECKS = {0: check(), 1: check("watch", replace(CLEAN, significant=True), COPY)}


@pytest.fixture
def shown(tmp_path: Path) -> Comparisons:
    write_epochs(tmp_path, CHECKS)
    return Comparisons(CHECKS, tmp_path, GALLERY, Album())


def test_the_grid_has_both_kinds_apart_and_the_base_first(shown: Comparisons) -> None:
    found = shown.grid()
    training, novel = found.split("<h3>Drawn from new prompts: a copy here is the grave case</h3>")
    assert "Drawn from training captions: some similarity is expected" in training
    assert "zumi at night" in training and "friends" not in training
    assert "zumi &amp; &lt;b&gt;friends&lt;/b&gt;" in novel and "at night" not in novel
    assert re.findall("<b>(.*?)</b>", training) == ["base", "epoch 1"]
    assert re.findall("href='#(.*?)'", training) == ["pair-0-0", "pair-1-0"]


def test_only_significant_images_are_marked(shown: Comparisons) -> None:
    training, novel = shown.grid().split("<h3>Drawn from new")
    assert (training.count("! match"), training.count("✕ match")) == (1, 0)
    assert (novel.count("! match"), novel.count("✕ match")) == (0, 1)
    assert "class='tile copying' href='#pair-1-1'" in novel


def test_a_missing_seed_leaves_its_place_empty(tmp_path: Path) -> None:
    checks = {0: check("clean", CLEAN), 1: check("clean", CLEAN, replace(CLEAN, seed=7))}
    write_epochs(tmp_path, checks)
    found = Comparisons(checks, tmp_path, GALLERY, Album()).grid()
    assert found.count("<span></span>") == 2  # above the prompts, and seed 7 of the base
    assert found.count("class='tile ") == 3 and "--seeds: 2" in found


def test_every_preview_is_beside_its_nearest_and_the_grave_ones_come_first(shown: Comparisons) -> None:
    found = shown.pairs(1)
    assert re.findall("id='(pair.*?)'", found) == ["pair-1-1", "pair-1-0"]
    first, second = found.split("</figure>")[:2]
    assert "✕ match on a new prompt</span> similarity 0.97, layout 0.60<b>" in first and "in 1 of 145 images." in first
    assert "<small>&lt;a&gt;.png</small>" in first and "aria-label='Percent of the preview that &lt;a&gt;.png" in first
    assert "! match</span> similarity 0.41" in second and "A training caption, seed 0." in second
    assert "<b>friends" not in found and "<a>.png" not in found
    assert "✓ no match" in shown.pairs(0)


def test_a_mirrored_copy_is_turned_from_the_start(tmp_path: Path) -> None:
    checks = {0: check("copying", COPY, replace(COPY, file="previews/p2.png"), CLEAN)}
    write_epochs(tmp_path, checks)
    GALLERY["<a>.png"].save(tmp_path / "0/previews/p1.png")
    ImageOps.mirror(GALLERY["<a>.png"]).save(tmp_path / "0/previews/p2.png")
    found = Comparisons(checks, tmp_path, GALLERY, Album()).pairs(0)
    assert ["checked" in pair for pair in found.split("</figure>")[:3]] == [False, True, False]


def test_only_nearest_images_are_embedded_and_each_once(shown: Comparisons) -> None:
    found = shown.grid() + shown.pairs(0) + shown.pairs(1)
    # Four previews, and the three images that one of them is nearest to.
    assert found.count("src='data:image") == 4 + 3
    assert NOVEL.nearest in found
