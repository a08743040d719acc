"""What sdlora promises, which test holds it, and what that test last found: makes docs/reliability.md.

    SDLORA_RECORD=1 pytest tests/reliability --slow && python tests/reliability/promises.py

The first command writes figures to docs/reliability.json, the second one the page.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
FIGURES = ROOT / "docs" / "reliability.json"
PAGE = ROOT / "docs" / "reliability.md"

Figure = Callable[[str, str], None]
"""Takes a promise's name and what its test found."""


@dataclass(frozen=True)
class Promise:
    """A row of the page.

    Attributes:
        name: What is promised, in a word or two.
        meaning: What is promised, in a sentence.
        test: The test's file under tests/ and its name; None where there is none.
        note: What the test does not show, or why there is none.
    """

    name: str
    meaning: str
    test: str | None
    note: str = ""


PROMISES = [
    Promise(
        "Exact resume",
        "Killed at any point and gone on with, a run ends in the same bytes: LoRA, optimizer, previews, checks.",
        "reliability/test_exact_resume.py::test_a_run_killed_anywhere_ends_in_the_same_bytes",
        "On a CPU; GPUs add up in an order of their own.",
    ),
]  # fmt: skip


def record(name: str, found: str) -> None:
    """Keep what a test found."""
    assert name in {promise.name for promise in PROMISES}, name
    figures = json.loads(FIGURES.read_text(encoding="utf-8")) if FIGURES.exists() else {}
    figures[name] = {"figure": found, "date": datetime.date.today().isoformat()}
    FIGURES.write_text(json.dumps(figures, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def page() -> str:
    """The page in Markdown."""
    figures = json.loads(FIGURES.read_text(encoding="utf-8"))
    lines = [
        "# What sdlora promises",
        "",
        "Each promise has a test, and each figure is what that test found when it last ran. Made by",
        "`SDLORA_RECORD=1 pytest tests/reliability --slow && python tests/reliability/promises.py`.",
        "",
        "| Promise | What it means | Found | When | Test |",
        "|---|---|---|---|---|",
    ]
    for promise in PROMISES:
        found = figures.get(promise.name, {"figure": "no figure yet", "date": ""})
        test = f"`tests/{promise.test}`" if promise.test else "none"
        meaning = f"{promise.meaning} {promise.note}".strip()
        lines.append(f"| {promise.name} | {meaning} | {found['figure']} | {found['date']} | {test} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
