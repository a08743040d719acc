"""Decoded images are kept, and many of them are decoded while a page is shown already."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
from helpers.studios import write_image

from sdlora.errors import DataError
from sdlora.ui.pages import images
from sdlora.ui.pages.app import changes
from sdlora.ui.pages.context import Context
from sdlora.ui.pages.looks import Look
from sdlora.ui.state import decoded
from sdlora.ui.state.decoded import Examiner, cached_decode


def test_an_image_is_decoded_again_when_its_file_changes(tmp_path: Path) -> None:
    file = write_image(tmp_path / "a.png")
    first = cached_decode(file, "white")
    assert cached_decode(file, "white") is first
    write_image(file, "blue", (64, 64))
    assert cached_decode(file, "white").size == (64, 64)
    file.write_bytes(b"no image")
    for _ in range(2):
        with pytest.raises(DataError):
            cached_decode(file, "white")
    file.unlink()
    with pytest.raises(DataError, match="removed"):
        cached_decode(file, "white")


def test_two_threads_decode_an_image_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, calls, real = write_image(tmp_path / "a.png"), [], decoded.decode

    def slow(*arguments: Any) -> Any:
        calls.append(arguments)
        time.sleep(0.05)
        return real(*arguments)

    monkeypatch.setattr(decoded, "decode", slow)
    threads = [threading.Thread(target=cached_decode, args=(file, "white")) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1


def test_a_large_set_is_shown_before_its_images_were_looked_at(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoded, "_FEW", 2)
    folder, waiting, real = context.studio.image_set("set"), threading.Event(), decoded.decode
    for number in range(4):
        write_image(folder / f"{number}.png", size=(40 + number, 30))
    (folder / "3.png").write_bytes(b"no image")
    monkeypatch.setattr(decoded, "decode", lambda *arguments: waiting.wait(10) and real(*arguments))
    shown = dict(zip(images.PARTS, images.show(context, "set"), strict=True))
    assert "looking at the images" in shown["summary"] and "4 images" in shown["summary"]
    assert shown["cards"].count("not looked at yet") == 4 and "✓" not in shown["cards"]
    _, look = changes(context, Look(images="set", drawn=shown["fingerprint"]))
    assert "listing" not in changes(context, look)[0]
    waiting.set()
    until = time.monotonic() + 10
    while context.fingerprint("set").endswith("?") and time.monotonic() < until:
        time.sleep(0.01)
    told = changes(context, look)[0]["listing"]["value"].partition(" ")[0]
    assert told == context.fingerprint("set") != shown["fingerprint"], "the cards are drawn again"
    shown = dict(zip(images.PARTS, images.show(context, "set"), strict=True))
    assert "to fix" in shown["summary"] and "unreadable image" in shown["cards"]


def test_a_set_is_not_decoded_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoded, "_FEW", 0)
    monkeypatch.setattr(decoded, "_MOST", 1)
    files = [write_image(tmp_path / f"{number}.png") for number in range(3)]
    examiner, until = Examiner(), time.monotonic() + 10
    while not examiner.is_done(files, "key") and time.monotonic() < until:
        time.sleep(0.01)
    assert examiner.is_done(files, "key") and not examiner.is_done(files, "another key")
