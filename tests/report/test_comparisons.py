from dataclasses import replace
from pathlib import Path

import pytest
from helpers.checks import CLEAN, COPY, GALLERY, NOVEL, check, write_epochs
from PIL import ImageOps

from sdlora.report.copy_section import Comparisons
from sdlora.report.html import Album, environment

CHECKS = {0: check(), 1: check("watch", replace(CLEAN, significant=True), COPY)}


@pytest.fixture
def shown(tmp_path: Path) -> Comparisons:
    write_epochs(tmp_path, CHECKS)
    return Comparisons(CHECKS, tmp_path, GALLERY, Album())


def written(macro: str, values: object) -> str:
    return str(getattr(environment().get_template("parts.html").module, macro)(values))


def test_grids_separate_both_kinds_and_start_with_the_base(shown: Comparisons) -> None:
    training, novel = shown.grids()
    assert "Training captions" in training.heading and "New prompts" in novel.heading
    assert [head for head, _ in training.heads] == ["base", "epoch 1"]
    assert [prompt for prompt, _ in training.prompts] == ["zumi at night"]
    assert [prompt for prompt, _ in novel.prompts] == ["zumi & <b>friends</b>"]
    assert [tile and tile.href for row in training.prompts[0][1] for tile in row] == ["#pair-0-0", "#pair-1-0"]
    html = written("epoch_grids", [training, novel])
    assert "zumi &amp; &lt;b&gt;friends&lt;/b&gt;" in html and "<b>friends" not in html


def test_only_significant_previews_are_marked(shown: Comparisons) -> None:
    training, novel = (written("epoch_grids", [grid]) for grid in shown.grids())
    assert (training.count("! match"), training.count("✕ match")) == (1, 0)
    assert (novel.count("! match"), novel.count("✕ match")) == (0, 1)
    assert '<a class="tile copying" href="#pair-1-1">' in novel


def test_missing_seed_leaves_its_place_empty(tmp_path: Path) -> None:
    checks = {0: check("clean", CLEAN), 1: check("clean", CLEAN, replace(CLEAN, seed=7))}
    write_epochs(tmp_path, checks)
    (grid,) = Comparisons(checks, tmp_path, GALLERY, Album()).grids()
    ((_, rows),) = grid.prompts
    assert [[tile is not None for tile in row] for row in rows] == [[True, True], [False, True]]
    found = written("epoch_grids", [grid])
    assert found.count("<span></span>") == 2, "above the prompts, and seed 7 of the base"
    assert found.count('class="tile ') == 3 and "--seeds: 2" in found


def test_pairs_start_with_the_serious_matches_and_name_the_nearest_image(shown: Comparisons) -> None:
    pairs = shown.pairs(1)
    assert [pair.id for pair in pairs] == ["pair-1-1", "pair-1-0"]
    found = written("pairs", pairs)
    first, second = found.split("</figure>")[:2]
    assert "✕ match on a new prompt</span> similarity 0.97, layout 0.60<b>" in first and "1 in 145 new images" in first
    assert "<small>&lt;a&gt;.png</small>" in first and "preview covered by &lt;a&gt;.png" in first
    assert "! match</span> similarity 0.41" in second and "Training caption, seed 0." in second
    assert "<b>friends" not in found and "<a>.png" not in found
    assert "✓ no match" in written("pairs", shown.pairs(0))


def test_mirrored_copy_starts_mirrored(tmp_path: Path) -> None:
    checks = {0: check("copying", COPY, replace(COPY, file="previews/p2.png"), CLEAN)}
    write_epochs(tmp_path, checks)
    GALLERY["<a>.png"].save(tmp_path / "0/previews/p1.png")
    ImageOps.mirror(GALLERY["<a>.png"]).save(tmp_path / "0/previews/p2.png")
    pairs = Comparisons(checks, tmp_path, GALLERY, Album()).pairs(0)
    assert [pair.is_mirrored for pair in pairs] == [False, True, False]
    found = written("pairs", pairs).split("</figure>")[:3]
    assert ['type="checkbox" checked>' in pair for pair in found] == [False, True, False]


def test_only_nearest_images_are_embedded_and_each_once(shown: Comparisons) -> None:
    found = written("epoch_grids", shown.grids()) + written("pairs", shown.pairs(0)) + written("pairs", shown.pairs(1))
    # Four previews, and the three images that one of them is nearest to.
    assert found.count('src="data:image') == 4 + 3
    assert NOVEL.nearest in found
