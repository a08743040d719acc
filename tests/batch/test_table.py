"""The table of a batch, and its lines where there is no terminal."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console

from sdlora.batch.table import BatchTable

MESSAGES: list[dict[str, Any]] = [
    {"job": "a", "event": "planned", "action": "start", "status": "waiting", "error": None, "moved": "out/a.1"},
    {"job": "b", "event": "planned", "action": "fault", "status": "failed", "error": "lora.rank: [no]\nmore"},
    {"job": "a", "event": "started", "folder": "out/a"},
    {"job": "a", "event": "plan", "steps": 40},
    {"job": "a", "event": "step", "step": 10, "loss": 0.5, "seconds": 2.0},
    {"job": "a", "event": "copycheck", "verdict": "watch"},
]
END: dict[str, Any] = {"job": "a", "event": "ended", "status": "done", "error": None, "seconds": 65.0}


def test_terminal_shows_one_row_per_job() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=150)
    table = BatchTable(console)
    with table:
        for message in MESSAGES:
            table.show(message)
        console.print(table._table())
        table.show(END)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "step 10/40, 1 min 00 s left" in shown
    assert "0.5000" in shown and "watch" in shown
    assert "lora.rank: [no]" in shown and "more" not in shown
    assert "1 min 05 s" in shown


def test_without_terminal_starts_and_ends_are_lines() -> None:
    console = Console(file=io.StringIO(), width=150)
    with BatchTable(console) as table:
        for message in [*MESSAGES, END]:
            table.show(message)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert lines[0].startswith("a: ") and "out/a.1" in lines[0]
    assert lines[1:] == ["a: started", "a: done"]
