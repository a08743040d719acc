"""The three loops run, in turns, on the built-in base."""

from __future__ import annotations

from pathlib import Path

import loop

from sdlora.common.bundled import pocket_folder


def test_three_loops_take_turns(tmp_path: Path) -> None:
    found = loop.measure(str(pocket_folder()), tmp_path, "fp32", steps=1, edge=64)
    assert set(found) == {"script", "peft cached", "sdlora", "sdlora's caching of an image"}
    assert all(len(values) == 1 and values[0] > 0 for values in found.values())
