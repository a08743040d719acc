"""Images of a set are found by what the data checks say, by tag and by words."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdlora.data.checks import Finding
from sdlora.ui.state.card_filter import ALL, choices, chosen, tags_of
from sdlora.ui.state.image_set import Card, SetView


@pytest.fixture
def view() -> SetView:
    captions = ["1girl, blue hair, rain", "1girl, smile, rain", "A girl stands in the rain.", ""]
    cards = tuple(
        Card(f"{place}.png", caption, (64, 64), "fine" if caption else "error", (), (64, 64))
        for place, caption in enumerate(captions)
    )
    findings = (
        Finding("no caption", "error", ("3.png",), ""),
        Finding("near-duplicate", "warning", ("0.png", "1.png"), ""),
    )
    return SetView(Path(), cards, findings, (("0.png", "1.png"),))


def test_tags_are_told_from_sentences() -> None:
    assert tags_of("1girl, blue hair,  rain ,") == ["1girl", "blue hair", "rain"]
    for caption in ("", "zumi, a red ball", "A girl, who stands in the rain, smiles.", "zumi, in a meadow, at night."):
        assert tags_of(caption) == []


def test_findings_and_tags_can_be_chosen(view: SetView) -> None:
    keys = [key for _, key in choices(view)]
    assert keys[:4] == [ALL, "finding:", "finding:no caption", "finding:near-duplicate"]
    assert keys[4:] == ["tag:1girl", "tag:rain", "tag:blue hair", "tag:smile"]
    assert choices(view)[4][0] == "Tag: 1girl (2)"


@pytest.mark.parametrize(
    ("wanted", "names"),
    [
        (ALL, "0123"), ("", "0123"), ("finding:", "3"), ("finding:near-duplicate", "01"), ("tag:rain", "01"),
        ("RAIN", "012"), ("stands in", "2"), ("nothing", ""), ("finding:cropped", ""), ("a: b", ""),
    ],
)  # fmt: skip
def test_choice_gives_its_images(view: SetView, wanted: str, names: str) -> None:
    assert [card.name for card in chosen(view, wanted)] == [f"{name}.png" for name in names]
