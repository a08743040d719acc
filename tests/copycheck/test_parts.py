"""Parts of training images, cut out of textured images and placed into others."""

from __future__ import annotations

import pytest
from helpers.checks import textured
from PIL import Image, ImageOps

from sdlora.copycheck import parts
from sdlora.copycheck.parts import PartFinder, parts_signal, why_unavailable


def test_images_too_small_are_told() -> None:
    pytest.importorskip("cv2")
    assert why_unavailable([textured(0)]) is None
    assert "256 px" in str(why_unavailable([textured(0), textured(1, 200)]))


def test_missing_library_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "find_spec", lambda _: None)
    assert "pip install 'sdlora[opencv]'" in str(why_unavailable([textured(0)]))


@pytest.mark.parametrize("is_mirrored", [False, True])
def test_a_moved_part_is_found_where_it_is(is_mirrored: bool) -> None:
    pytest.importorskip("cv2")
    gallery = {f"{seed}.png": textured(seed) for seed in range(4)}
    part = gallery["2.png"].crop((20, 40, 140, 160))
    preview = textured(9)
    preview.paste(ImageOps.mirror(part) if is_mirrored else part, (120, 100))
    finder = PartFinder(gallery)
    found = finder.find(preview)
    assert found is not None and found.name == "2.png" and found.points > 50
    for outline, (left, top) in ((found.preview, (120, 100)), (found.training, (20, 40))):
        inside = [left <= 256 * x <= left + 120 and top <= 256 * y <= top + 120 for x, y in outline]
        assert sum(inside) >= len(inside) - 1
    assert finder.find(textured(10)) is None
    assert finder.find(Image.new("RGB", (256, 256))) is None


def test_two_shots_of_one_moment_do_not_hide_parts() -> None:
    pytest.importorskip("cv2")
    alone = PartFinder({f"{seed}.png": textured(seed) for seed in range(4)})
    twice = PartFinder({f"{seed % 4}{seed}.png": textured(seed % 4) for seed in range(5)})
    assert twice.usual == alone.usual


def test_signal_counts_previews_and_decides_nothing() -> None:
    none = parts_signal([None, None])
    assert (none.value, none.outside) == (0.0, False)
    found = parts_signal([None, parts.Part("a.png", 60, [], []), parts.Part("b.png", 90, [], [])])
    assert found.value == pytest.approx(2 / 3) and not found.outside
    assert "2 of 3" in found.meaning and "b.png" in found.meaning
