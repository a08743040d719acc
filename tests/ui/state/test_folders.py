"""Names from anywhere stay names, and folders stay inside."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from helpers.hostile import NAMES

from sdlora.errors import SdloraError
from sdlora.ui.state.folders import Studio, run_name, safe_name
from sdlora.ui.state.locations import images_folder


@pytest.mark.parametrize("name", NAMES)
def test_hostile_name_is_made_safe(name: str, tmp_path: Path) -> None:
    made = safe_name(name)
    file = tmp_path / made
    file.write_text("x")
    assert [path.name for path in tmp_path.iterdir()] == [made]
    assert made == safe_name(made), "it stays as it is from then on"
    assert not made.startswith((".", "-")) and len(made) <= 90
    assert not set(made) & set("/\\<>:\"'|?*;$`&\n\r\t\0") and made.isprintable()


@pytest.mark.parametrize("name", NAMES)
def test_hostile_run_name_is_refused(name: str, studio: Studio) -> None:
    try:
        folder = studio.run(name)
    except SdloraError as error:
        assert repr(name) in str(error)
    else:
        assert folder.parent == studio.runs and folder.name == name == safe_name(name)


@pytest.mark.parametrize("name", ["zumi", "zumi 2", "My-LoRA_v1.5", "ズミ"])
def test_safe_name_is_unchanged(name: str, studio: Studio) -> None:
    assert safe_name(name) == run_name(name) == name
    assert studio.image_set(name).parent == studio.sets


@pytest.mark.parametrize("name", ["Mia's cat", "zumi 🐈", "<b>x</b>", "zum\u0000i", "..", "con", "a b.", "x" * 90])
def test_odd_name_of_a_set_is_refused_with_one_that_is_valid(name: str, studio: Studio) -> None:
    before = set(studio.runs.rglob("*"))
    with pytest.raises(SdloraError) as caught:
        images_folder(studio, name)
    assert set(studio.runs.rglob("*")) == before
    if "/" not in name:
        suggested = re.findall(r"such as '(.+)'", str(caught.value))[0]
        assert images_folder(studio, suggested).parent == studio.sets.resolve()


def test_misspelt_folder_is_refused(studio: Studio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    assert images_folder(studio, str(tmp_path / "images")) == tmp_path / "images"
    assert images_folder(studio, "images").parent == studio.sets.resolve(), "a name is never a path"
    for wrong in (str(tmp_path / "imagse"), "./images", "~nobody-at-all/images", str(tmp_path / "images" / "a.png")):
        with pytest.raises(SdloraError):
            images_folder(studio, wrong)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "runs"]
    assert studio.owns(images_folder(studio, "set")) and not studio.owns(tmp_path / "images")


@pytest.mark.parametrize("name", ["..", "a/b", "", "pictures", "bases", "CON", "con.txt", "a.", ".hidden", "x" * 101])
def test_reserved_names_are_refused(name: str) -> None:
    with pytest.raises(SdloraError):
        run_name(name)


def test_folder_elsewhere_is_refused_over_the_network(tmp_path: Path) -> None:
    closed = Studio(tmp_path / "runs", any_folder=False)
    closed.create()
    assert closed.allowed(closed.sets / "a") == closed.sets / "a"
    (closed.sets / "link").symlink_to(tmp_path)
    for folder in (tmp_path, closed.runs / ".." / "other", closed.sets / "link"):
        with pytest.raises(SdloraError, match="over the network"):
            closed.allowed(folder)
    assert Studio(tmp_path / "runs").allowed(tmp_path) == tmp_path
