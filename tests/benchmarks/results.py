"""Results as JSON lines: every finished cell is kept at once, and skipped the next time."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Cell = dict[str, Any]
"""What is measured: "part", "concept", "seed" and whatever else tells it from others."""


def read(path: Path) -> list[dict[str, Any]]:
    """All finished cells, {"cell": ..., "seconds": ..., ...} each."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def run_missing(
    path: Path, cells: Iterable[Cell], measure: Callable[[Cell], dict[str, Any]], *, show: Callable[[str], None]
) -> None:
    """Measure the cells that are not in the file yet, one after the other.

    Args:
        path: The results; other processes may add to it meanwhile.
        cells: What to measure, in this order.
        measure: A cell to its figures.
        show: Gets each finished line.
    """
    for cell in cells:
        if any(row["cell"] == cell for row in read(path)):
            continue
        start = time.monotonic()
        figures = measure(cell)
        line = json.dumps({"cell": cell, "seconds": round(time.monotonic() - start, 1), **figures})
        # One write of one line, so that two processes never mix theirs.
        with path.open("a", encoding="utf-8") as handle:
            handle.write(line + "\n")
        show(line)


def share(cells: list[Cell], part: str) -> list[Cell]:
    """Every n-th cell, for one of n processes; "0/2" and "1/2" together are all.

    Raises:
        ValueError: It is not of that form.
    """
    number, _, count = part.partition("/")
    if not (number.isdigit() and count.isdigit() and int(number) < int(count)):
        raise ValueError(f"--share {part!r}: expected such as 0/2, the first of two processes.")
    return cells[int(number) :: int(count)]
