"""What a tab is told at intervals: only what has changed, and no note outlives what it is about."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from helpers.studios import write_image, write_state

from sdlora.config.schema import RunConfig
from sdlora.ui.pages.app import build
from sdlora.ui.pages.context import Context
from sdlora.ui.state import queue


@pytest.fixture
def tick(context: Context) -> Callable[..., tuple[dict[str, Any], str]]:
    """Asks as a tab does; returns the updates by element, and what the tab sends the next time."""
    blocks = build(context)
    (asked,) = (one for one in blocks.fns.values() if [name for _, name in one.targets] == ["tick"])

    def ask(seen: str = "{}", name: str | None = None, images: str = "") -> tuple[dict[str, Any], str]:
        answer = dict(asked.fn(name, None, images, seen))
        texts = {part.elem_id: update for part, update in answer.items() if not isinstance(update, str)}
        return texts, next(value for value in answer.values() if isinstance(value, str))

    return ask


def test_a_note_is_cleared_when_what_it_is_about_has_changed(
    context: Context,
    make_config: Callable[..., RunConfig],
    tick: Callable[..., tuple[dict[str, Any], str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(queue.subprocesses, "find_by_pid", lambda pid, _: pid or None)
    monkeypatch.setattr(queue.subprocesses, "is_paused", lambda _: False)
    write_state(context.studio, make_config("a"), pid=1)
    updates, seen = tick()
    assert "training-note" not in updates, "a note of this moment stays"
    write_state(context.studio, make_config("a"), pid=1, step=4)
    updates, seen = tick(seen, "a")
    assert "status" in updates and "training-note" not in updates
    write_state(context.studio, make_config("a"), status="stopped")
    updates, seen = tick(seen, "a")
    assert updates["training-note"]["value"] == "" and updates["recipe-note"]["value"] == ""
    assert tick(seen, "a") == ({}, json.dumps(json.loads(seen)))


def test_a_tab_is_told_of_images_that_come_and_go(
    context: Context, tick: Callable[..., tuple[dict[str, Any], str]]
) -> None:
    image = write_image(context.studio.image_set("set") / "a.png")
    updates, seen = tick(images="set")
    before = updates["listing"]["value"]
    assert "listing" not in tick(seen, images="set")[0]
    image.unlink()
    updates, seen = tick(seen, images="set")
    assert updates["listing"]["value"] != before
    assert tick(seen, images="../x")[0]["listing"]["value"] == "" and context.fingerprint("none") != ""
