"""Changes of all captions: what each would change is known before, and is what is done."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.studios import write_image

from sdlora.errors import SdloraError
from sdlora.ui.pages.caption_editor import apply, propose
from sdlora.ui.pages.context import Context
from sdlora.ui.state import caption_edits, image_set
from sdlora.ui.state.caption_edits import CaptionEdit, differences


@pytest.fixture
def folder(context: Context) -> Path:
    made = context.studio.image_set("mine")
    for name, caption in {"a": "a red thing", "b": "a blue thing", "c": "a green thing"}.items():
        write_image(made / f"{name}.png", caption.split()[1]).with_suffix(".txt").write_text(caption, encoding="utf-8")
    return made


def test_all_captions_can_be_changed(folder: Path) -> None:
    def change(edit: Callable[..., CaptionEdit], *words: str) -> int:
        captions = edit(image_set.view(folder), *words).after
        image_set.write_captions(folder, captions)
        return len(captions)

    assert change(caption_edits.replace_words, "thing", "ball") == 3
    assert change(caption_edits.replace_words, "red", "dark red") == 1
    image_set.write_captions(folder, {"b.png": "zumi, blue"})
    assert change(caption_edits.prepend_trigger, "zumi") == 2
    assert image_set.captions_of(folder) == {
        "a.png": "zumi, a dark red ball", "b.png": "zumi, blue", "c.png": "zumi, a green ball",
    }  # fmt: skip
    image_set.write_captions(folder, {"c.png": ""})
    assert change(caption_edits.fill_missing_captions, "zumi somewhere") == 1
    assert image_set.view(folder).cards[2].caption == "zumi somewhere"


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (caption_edits.replace_words, ("", "x")),
        (caption_edits.prepend_trigger, (" ",)),
        (caption_edits.fill_missing_captions, ("",)),
        (caption_edits.fill_missing_captions, (" ",)),
    ],
)
def test_an_empty_field_changes_no_caption(folder: Path, edit: Callable[..., object], words: tuple[str, ...]) -> None:
    (folder / "a.txt").unlink()
    with pytest.raises(SdloraError):
        edit(image_set.view(folder), *words)


def plan(edit: CaptionEdit, kind: str, *texts: str) -> str:
    """What a page keeps of a proposal."""
    return json.dumps({"images": "mine", "kind": kind, "texts": texts, "fingerprint": edit.fingerprint})


def test_a_change_is_shown_before_it_is_done_and_can_be_undone(context: Context, folder: Path) -> None:
    before = image_set.captions_of(folder)
    shown, edit = propose(context, "mine", "replace", "red thing", "<b>ball</b>")
    assert "<del>red thing</del><ins>&lt;b&gt;ball&lt;/b&gt;</ins>" in "".join(shown.split("\n")).replace("> <", "><")
    assert edit is not None and image_set.captions_of(folder) == before
    apply(context, plan(edit, "replace", "red thing", "<b>ball</b>"))
    assert image_set.captions_of(folder) == before | {"a.png": "a <b>ball</b>"}
    editor = context.editor("mine")
    assert editor.last_change is not None
    editor.undo(editor.last_change.key)
    assert image_set.captions_of(folder) == before


def test_a_change_of_other_captions_than_shown_is_asked_about_again(context: Context, folder: Path) -> None:
    _, edit = propose(context, "mine", "replace", "thing", "ball")
    assert edit is not None
    image_set.write_captions(folder, {"c.png": "nothing of the kind"})
    message, again = apply(context, plan(edit, "replace", "thing", "ball"))
    assert again is not None and again.captions.keys() == {"a.png", "b.png", "c.png"} and "meantime" in message
    assert image_set.captions_of(folder)["a.png"] == "a red thing"
    assert apply(context, plan(again, "replace", "thing", "ball"))[1] is None
    assert image_set.captions_of(folder)["a.png"] == "a red ball"


def test_a_change_of_nothing_is_not_asked_about(context: Context, folder: Path) -> None:
    for kind, texts in (("replace", ("purple", "x")), ("fill", ("x",)), ("trigger", ("",)), ("replace", ("", ""))):
        message, edit = propose(context, "mine", kind, *texts)
        assert edit is None and "verdict" in message
    assert propose(context, "../x", "fill", "x")[1] is None


@pytest.mark.parametrize("plan", ["", "{", "[]", '{"images": 3}', '{"images": "mine"}', '{"images": "", "kind": "x"}'])
def test_a_plan_that_is_none_changes_nothing(context: Context, folder: Path, plan: str) -> None:
    message, edit = apply(context, plan)
    assert edit is None and "nothing to confirm" in message


def test_differences_are_words() -> None:
    assert differences("a red thing here", "a blue thing") == [
        ("same", "a"), ("gone", "red"), ("new", "blue"), ("same", "thing"), ("gone", "here"),
    ]  # fmt: skip
    assert differences("", "x") == [("new", "x")]
