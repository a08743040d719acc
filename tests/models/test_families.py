"""The registry: which family a base model is of, and whose settings suit it."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.studios import write_base

from sdlora.models.families import CLASSES, FAMILIES, family_named, family_on_disk, suits


@pytest.mark.parametrize("family", CLASSES)
def test_a_folder_of_the_true_shape_is_of_its_family(family: str, tmp_path: Path) -> None:
    assert family_on_disk(str(write_base(tmp_path / "base", family, "epsilon"))) == family


@pytest.mark.parametrize("family", CLASSES)
def test_names_are_of_one_family(family: str) -> None:
    names = FAMILIES[family]  # type: ignore[index]
    assert family_named(names.modelspec) == family


@pytest.mark.parametrize(
    ("made_for", "found", "suit"),
    [
        ("any", "sdxl", True),
        ("sdxl", "sdxl", True),
        ("sdxl", None, True),
        ("sd1", "sd2", False),
        ("sdxl", "z-image", False),
        ("pocket", "sd1", False),
        ("flux2-klein-4b", "flux2-klein-9b", True),
        ("flux2-klein-9b", "flux2-klein-4b", True),
    ],
)
def test_settings_suit_their_family_and_the_sizes_that_share_its_presets(
    made_for: str, found: str | None, suit: bool
) -> None:
    assert suits(made_for, found) == suit
