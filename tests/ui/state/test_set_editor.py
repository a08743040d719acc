"""A folder of the artist's own is only read, and whatever is removed can be put back."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from helpers.studios import write_image

from sdlora.data.dataset import load_dataset
from sdlora.errors import SdloraError
from sdlora.ui.pages.context import Context
from sdlora.ui.settings.draft import Draft
from sdlora.ui.state import bin as bin_
from sdlora.ui.state import image_set
from sdlora.ui.state.bin import Bin
from sdlora.ui.state.caption_edits import replace_words
from sdlora.ui.state.folder_notes import FolderNotes, read_notes


def fill(folder: Path) -> Path:
    for name, color in (("a", "red"), ("b", "blue"), ("c", "green")):
        write_image(folder / f"{name}.png", color, (600, 520))
        (folder / f"{name}.txt").write_text(f"a {color} thing", encoding="utf-8")
    return folder


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    """A folder of the artist's own."""
    return fill(tmp_path / "my drawings")


@pytest.fixture
def ours(context: Context) -> Path:
    """The studio's set "mine"."""
    return fill(context.studio.image_set("mine"))


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def names(context: Context, images: str) -> list[str]:
    return [card.name for card in context.view_set(Draft(images=images)).cards]


def test_a_folder_of_the_artists_own_is_never_changed_by_taking_out(context: Context, theirs: Path) -> None:
    before = content(theirs)
    editor = context.editor(str(theirs))
    editor.take_out("a.png")
    editor.take_out("c.png")
    assert (content(theirs), names(context, str(theirs))) == (before, ["b.png"])
    config = Draft(images=str(theirs)).config(context.studio)
    assert config.data.exclude == ["a.png", "c.png"]
    assert [example.name for example in load_dataset(*config.data.sets).examples] == ["b.png"], "and a run obeys"
    change = editor.last_change
    assert change is not None and "c.png" in change.words
    editor.undo(change.key)
    assert names(context, str(theirs)) == ["b.png", "c.png"]
    editor.put_all_back()
    assert names(context, str(theirs)) == ["a.png", "b.png", "c.png"] and content(theirs) == before
    assert Draft(images=str(theirs)).config(context.studio).data.exclude == []
    with pytest.raises(SdloraError, match="no image"):
        editor.take_out("../a.png")


def test_nothing_is_written_in_a_folder_of_the_artists_own_before_it_is_allowed(context: Context, theirs: Path) -> None:
    before = content(theirs)
    editor = context.editor(str(theirs))
    for action in (
        editor.writable,
        lambda: editor.write_caption("a.png", "x"),
        lambda: editor.change_captions({"a.png": "x"}, "changed"),
    ):
        with pytest.raises(SdloraError, match="folder of your own"):
            action()
    assert editor.needs_permission and content(theirs) == before
    editor.allow_writing()
    again = context.editor(str(theirs))
    again.write_caption("a.png", "x")
    assert (theirs / "a.txt").read_text() == "x" and not again.needs_permission
    assert context.editor(str(fill(theirs.parent / "others"))).needs_permission, "every folder is asked about"


def test_what_is_taken_out_of_a_set_of_the_studio_lies_in_the_bin(context: Context, ours: Path) -> None:
    write_image(ours / "a.jpg", "yellow")
    before = content(ours)
    editor = context.editor("mine")
    editor.take_out("a.jpg")
    assert (ours / "a.txt").exists(), "a.png has it still"
    editor.take_out("a.png")
    assert content(ours).keys() == {"b.png", "b.txt", "c.png", "c.txt"}
    assert {"a.png", "a.txt", "a.jpg"} <= content(context.studio.bin).keys()
    for _ in range(2):
        assert editor.last_change is not None
        editor.undo(editor.last_change.key)
    assert content(ours) == before and editor.last_change is None
    with pytest.raises(SdloraError, match="undone already"):
        editor.undo("0" * 20)


def test_putting_back_never_replaces_a_file(context: Context, ours: Path) -> None:
    editor = context.editor("mine")
    editor.take_out("a.png")
    write_image(ours / "a.png", "white")
    now = content(ours)
    assert editor.last_change is not None
    with pytest.raises(SdloraError, match=r"a\.png"):
        editor.undo(editor.last_change.key)
    assert content(ours) == now and editor.last_change is not None
    (ours / "a.png").unlink()
    editor.undo(editor.last_change.key)
    assert names(context, "mine") == ["a.png", "b.png", "c.png"]


def test_changed_captions_are_undone_where_nobody_edited_them_since(context: Context, ours: Path) -> None:
    editor = context.editor("mine")
    captions = replace_words(image_set.view(ours), "thing", "ball").after
    editor.change_captions(captions, "3 captions were changed")
    editor.write_caption("b.png", "my own words")
    change = editor.last_change
    assert change is not None and change.words == "3 captions were changed"
    assert "1 captions" in editor.undo(change.key)
    assert image_set.captions_of(ours) == {"a.png": "a red thing", "b.png": "my own words", "c.png": "a green thing"}
    editor.change_captions({}, "0 captions were changed")
    assert editor.last_change is None, "what changed nothing is not to be undone"


def test_the_bin_is_emptied_after_a_month(context: Context, ours: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    editor = context.editor("mine")
    editor.take_out("a.png")
    Bin(context.studio).empty()
    assert editor.last_change is not None
    later = time.time_ns() + (bin_.KEPT_SECONDS + 60) * 10**9
    monkeypatch.setattr(time, "time_ns", lambda: later)
    Bin(context.studio).empty()
    assert editor.last_change is None and content(context.studio.bin) == {}


def test_shipped_sets_are_left_as_they_are_but_may_be_trained_in_part(context: Context) -> None:
    editor = context.editor("builtin:zumi")
    assert not editor.needs_permission
    with pytest.raises(SdloraError, match="Shipped"):
        editor.write_caption("zumi_00.png", "x")
    editor.take_out("zumi_00.png")
    assert Draft(images="builtin:zumi").config(context.studio).data.exclude == ["zumi_00.png"]
    assert read_notes(context.studio, context.studio.image_set("mine")) == FolderNotes()
