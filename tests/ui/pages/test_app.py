"""What a tab is told at intervals: only what has changed, and no note outlives what it is about."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import psutil
import pytest
from helpers.studios import write_image, write_state

from sdlora.config.schema import RunConfig
from sdlora.config.toml import load_config
from sdlora.ui.pages import images
from sdlora.ui.pages.app import changes, first_page, has_news
from sdlora.ui.pages.context import Context
from sdlora.ui.pages.looks import Look, Looks
from sdlora.ui.settings.draft import Draft, write_draft
from sdlora.ui.state import queue


def tick(context: Context, seen: Look, **looked: str) -> tuple[dict[str, Any], Look]:
    """Asks as a tab does; returns the updates by part, and what the tab shows then."""
    return changes(context, replace(seen, **looked))


def test_a_note_is_cleared_when_what_it_is_about_has_changed(
    context: Context,
    make_config: Callable[..., RunConfig],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(queue.subprocesses, "find_by_pid", lambda pid, _: pid or None)
    monkeypatch.setattr(queue.subprocesses, "is_paused", lambda _: False)
    write_state(context.studio, make_config("a"), pid=1)
    updates, seen = tick(context, Look())
    assert "training-note" not in updates, "a note of this moment stays"
    write_state(context.studio, make_config("a"), pid=1, step=4)
    updates, seen = tick(context, seen, run="a")
    assert "status" in updates and "training-note" not in updates
    write_state(context.studio, make_config("a"), status="stopped")
    updates, seen = tick(context, seen, run="a")
    assert updates["training-note"]["value"] == "" and updates["recipe-note"]["value"] == ""
    assert tick(context, seen, run="a") == ({}, seen)


def test_a_tab_asks_for_news_with_a_token(context: Context, make_config: Callable[..., RunConfig]) -> None:
    token = context.looks.keep(changes(context, Look())[1])
    assert len(token) == 16 and not has_news(context, token) and has_news(context, "from before a restart")
    write_state(context.studio, make_config("a"), status="done")
    assert has_news(context, token)


def test_looks_that_were_not_asked_for_are_forgotten_first() -> None:
    looks = Looks()
    first, second = (looks.keep(Look(run=name)) for name in ("first", "second"))
    for number in range(998):
        looks.keep(Look(run=str(number)))
    assert looks.find(first) is not None
    looks.keep(Look(run="one more"))
    assert looks.find(second) is None and looks.find(first) == Look(run="first")


def test_a_tab_is_told_of_images_that_come_and_go(context: Context) -> None:
    image = write_image(context.studio.image_set("set") / "a.png")
    updates, seen = tick(context, Look(), images="set")
    before = updates["listing"]["value"]
    assert "listing" not in tick(context, seen, images="set")[0]
    image.unlink()
    updates, seen = tick(context, seen, images="set")
    assert updates["listing"]["value"] != before
    assert tick(context, seen, images="../x")[0]["listing"]["value"] == " " and context.fingerprint("none") != ""


def test_a_tab_is_told_of_an_image_that_came_and_went_between_two_looks(context: Context) -> None:
    write_image(context.studio.image_set("set") / "b.png")
    drawn = context.fingerprint("set")
    _, seen = tick(context, Look(), images="set", drawn=drawn)
    # A caption is saved while there is another image, and the cards are drawn with it.
    image = write_image(context.studio.image_set("set") / "a.png")
    with_it = context.fingerprint("set")
    image.unlink()
    updates, seen = tick(context, seen, images="set", drawn=with_it)
    assert updates["listing"]["value"] == f"{drawn} {with_it}"
    assert "listing" in tick(context, seen, images="set", drawn=drawn)[0]


def test_the_first_page_is_the_addresss_or_what_is_new(
    context: Context, make_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert first_page(context, "") == "images" and first_page(context, "runs") == "runs"
    assert first_page(context, "<x>") == "images"
    write_state(context.studio, make_config("a"), status="done")
    assert first_page(context, "") == "result" and first_page(context, "images") == "images"
    write_draft(context.studio, Draft(images="next"))
    assert first_page(context, "") == "images", "the artist has gone on since"
    monkeypatch.setattr(queue.subprocesses, "find_by_pid", lambda pid, _: pid or None)
    monkeypatch.setattr(queue.subprocesses, "is_paused", lambda _: False)
    write_state(context.studio, make_config("b"), pid=1)
    assert first_page(context, "") == "training"


def test_a_new_user_is_told_what_this_is_and_tries_it_in_one_click(
    context: Context, sleepers: list[psutil.Process]
) -> None:
    values = dict(zip(images.PARTS, images.show(context, ""), strict=True))
    assert values["summary"].count("<img") == 3 and "Drop 10 to 40 images" in values["summary"]
    assert values["trial"]["visible"] and not values["only"]["visible"]
    assert images.start_trial(context) == "zumi trial" and len(sleepers) == 1
    config = load_config(str(context.studio.job_config("zumi trial")))
    assert (config.data.raw_folder, config.data.raw_trigger, config.base.path) == ("builtin:zumi", "zumi", "pocket")
    values = dict(zip(images.PARTS, images.show(context, "builtin:zumi"), strict=True))
    assert not values["trial"]["visible"]


def test_only_a_choice_of_images_is_shown_as_long_as_there_are_some(context: Context) -> None:
    folder = context.studio.image_set("set")
    for name, caption in {"a": "1girl, rain, smile", "b": ""}.items():
        write_image(folder / f"{name}.png", "red" if caption else "blue").with_suffix(".txt").write_text(caption)

    def names(only: str) -> list[str]:
        values = dict(zip(images.PARTS, images.show(context, "set", only), strict=True))
        assert values["only"]["visible"]
        return re.findall('data-image="([^"]+)"', values["cards"])

    assert names("finding:no caption") == ["b.png"] and names("tag:rain") == ["a.png"] and names("GIRL") == ["a.png"]
    (folder / "b.txt").write_text("sun, sea, sand")
    assert names("finding:no caption") == ["a.png", "b.png"]


def test_captions_come_before_what_is_pressed_less_often(context: Context) -> None:
    folder = context.studio.image_set("set")
    write_image(folder / "a.png").with_suffix(".txt").write_text("1girl, rain, <b>")
    cards = images.show(context, "set")[images.PARTS.index("cards")]
    assert cards.index("<textarea") < cards.index('class="tag"') < cards.index('class="remove"')
    assert 'width="48" height="32"' in cards, "what is below an image does not move when it comes"
    assert 'data-tag="&lt;b&gt;"' in cards and "of 75 tokens" in cards


def test_an_upload_tells_how_far_it_is_and_leaves_nothing_behind(context: Context) -> None:
    uploads = context.studio.own / "uploads"
    files = [write_image(uploads / name / f"{name}.png", "red" if name == "a" else "blue") for name in ("a", "b")]
    told: list[tuple[int, int]] = []
    answer = images._add(context, [str(file) for file in files], None, lambda *far: told.append(far))
    assert told == [(0, 2), (1, 2)] and "2 images and 0 captions" in answer[0]
    assert list(uploads.iterdir()) == [] and sorted(context.studio.image_set("my images").iterdir())


def test_a_page_looks_again_at_a_set_that_changes_while_it_is_read(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_image(context.studio.image_set("set") / "a.png")
    other = write_image(context.studio.image_set("set") / "b.png")
    read = Context.view_set

    def read_and_lose(self: Context, draft: Draft) -> Any:
        found = read(self, draft)
        other.unlink()
        return found

    monkeypatch.setattr(Context, "view_set", read_and_lose)
    shown = images.show(context, "set")
    assert "b.png" in shown[images.PARTS.index("cards")]
    assert shown[images.PARTS.index("fingerprint")] != context.fingerprint("set"), "the next tick draws it anew"
