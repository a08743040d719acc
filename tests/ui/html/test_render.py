"""Copies of images for the browser: made when they are asked for, under names that say nothing of their files."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.studios import write_image
from PIL import Image

from sdlora.errors import DataError
from sdlora.ui.html.render import NAME, ROUTE, file_url, make_copy


@pytest.mark.parametrize(("size", "suffix", "shown"), [((40, 30), "png", (40, 30)), ((800, 400), "jpg", (320, 160))])
def test_a_copy_is_made_when_it_is_asked_for(
    tmp_path: Path, size: tuple[int, int], suffix: str, shown: tuple[int, int]
) -> None:
    folder, file = tmp_path / "shown", write_image(tmp_path / "a.png", size=size)
    folder.mkdir()
    name = file_url(folder, file).removeprefix(f"{ROUTE}/")
    assert NAME.fullmatch(name) and name.endswith(suffix) and not list(folder.iterdir())
    assert make_copy(folder, name) and [path.name for path in folder.iterdir()] == [name]
    with Image.open(folder / name) as image:
        assert image.size == shown
    assert file_url(folder, file) == f"{ROUTE}/{name}"


def test_only_addresses_that_were_given_out_make_copies(tmp_path: Path) -> None:
    assert not make_copy(tmp_path, "0" * 40 + ".png")
    broken = tmp_path / "b.png"
    broken.write_bytes(write_image(tmp_path / "a.png", size=(300, 300)).read_bytes()[:200])
    name = file_url(tmp_path, broken).removeprefix(f"{ROUTE}/")
    assert not make_copy(tmp_path, name) and not (tmp_path / name).exists()
    broken.write_bytes(b"no image")
    with pytest.raises(DataError):
        file_url(tmp_path, broken)
