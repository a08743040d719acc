"""The benchmark of the cache at small size."""

from __future__ import annotations

from pathlib import Path

from cache_reads import BATCH, measure


def test_a_map_costs_less_than_opening(tmp_path: Path) -> None:
    found = measure(tmp_path, 2 * BATCH)
    assert 0 < found["own memory"] < found["opened each time"]
    # Five to ten times as fast on an idle machine; the processor's time is told, in turns.
    assert found["mapped"] < 0.5 * found["opened each time"]
