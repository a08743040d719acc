"""Folders in kohya's form become sets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sdlora.config.toml import parse_config
from sdlora.errors import ConfigError


def folder(path: Path, *images: str) -> Path:
    path.mkdir(parents=True)
    for name in images:
        Image.new("RGB", (8, 8)).save(path / name)
    return path


def parsed(path: Path, **data: Any) -> Any:
    return parse_config({"data": {"folder": str(path), **data}}, name="x")


def test_repeats_and_captions_come_from_the_names(tmp_path: Path) -> None:
    folder(tmp_path / "10_zumi cat", "a.png")
    folder(tmp_path / "5_style", "b.png")
    folder(tmp_path / "notes", "c.png")
    sets = parsed(tmp_path).data.sets
    assert [(one.folder, one.repeats, one.caption, one.prefix) for one in sets] == [
        (str(tmp_path / "10_zumi cat"), 10, "zumi cat", "10_zumi cat/"),
        (str(tmp_path / "5_style"), 5, "style", "5_style/"),
    ]


def test_images_are_left_out_by_their_path_in_the_folder_that_was_chosen(tmp_path: Path) -> None:
    folder(tmp_path / "img" / "10_zumi", "a.png", "b.png")
    folder(tmp_path / "img" / "5_style", "b.png")
    data = parsed(tmp_path, exclude=["img/10_zumi/b.png"]).data
    assert ([one.exclude for one in data.sets], data.exclude) == ([("b.png",), ()], [])


def test_a_common_caption_stays(tmp_path: Path) -> None:
    folder(tmp_path / "10_zumi", "a.png")
    assert parsed(tmp_path, caption="a drawing").data.sets[0].caption == "a drawing"


def test_exposures_keep_the_proportion_of_repeats(tmp_path: Path) -> None:
    folder(tmp_path / "10_zumi", "a.png")
    folder(tmp_path / "5_style", "b.png")
    config = parse_config({"data": {"folder": str(tmp_path)}, "train": {"exposures": 100, "epochs": 5}}, name="x")
    assert [one.repeats for one in config.data.sets] == [20, 10]


@pytest.mark.parametrize("inside", [True, False])
def test_reg_folder_is_preserved(tmp_path: Path, inside: bool) -> None:
    top = tmp_path / "img"
    folder(top / "10_zumi", "a.png")
    reg = folder((top if inside else tmp_path) / "reg" / "1_cat", "b.png")
    for given in (top, *([] if inside else [tmp_path])):
        config = parsed(given)
        assert [one.folder for one in config.data.sets] == [str(top / "10_zumi")]
        assert (config.data.preservation_folder, config.data.preservation_caption) == (str(reg), "cat")
        assert config.train.preservation_weight == 1.0


def test_what_is_preserved_already_stays(tmp_path: Path) -> None:
    folder(tmp_path / "10_zumi", "a.png")
    folder(tmp_path / "reg" / "1_cat", "b.png")
    document = {
        "data": {"folder": str(tmp_path), "class_words": ["cat"], "trigger": "zumi"},
        "train": {"preservation_weight": 0.5},
    }
    config = parse_config(document, name="x")
    assert (config.data.preservation_folder, config.train.preservation_weight) == (None, 0.5)


def test_several_kinds_to_preserve_are_refused(tmp_path: Path) -> None:
    folder(tmp_path / "10_zumi", "a.png")
    folder(tmp_path / "reg" / "1_cat", "b.png")
    folder(tmp_path / "reg" / "1_dog", "c.png")
    with pytest.raises(ConfigError, match=r"reg holds 2 kinds.*data\.preservation_folder"):
        parsed(tmp_path)


@pytest.mark.parametrize("names", [("a.png",), ("a.JPG",)])
def test_folder_with_images_of_its_own_stays_one_set(tmp_path: Path, names: tuple[str, ...]) -> None:
    folder(tmp_path / "set", *names)
    folder(tmp_path / "set" / "10_zumi", "b.png")
    assert [one.folder for one in parsed(tmp_path / "set").data.sets] == [str(tmp_path / "set")]


@pytest.mark.parametrize("name", ["0_zumi", "zumi", "10_", "x_zumi"])
def test_other_subfolders_are_no_sets(tmp_path: Path, name: str) -> None:
    folder(tmp_path / name, "a.png")
    assert [one.folder for one in parsed(tmp_path).data.sets] == [str(tmp_path)]
