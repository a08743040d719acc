"""What became of jobs is kept, by one process at a time."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdlora.batch.ledger import Ledger, Record, locked
from sdlora.errors import OutputError


def test_saved_records_are_read_back(tmp_path: Path) -> None:
    ledger = Ledger.read(tmp_path)
    assert ledger.records == {}
    ledger.put("a", Record("done", "x", None, None, 0, 3, 1.5, 1000))
    ledger.put("b", Record("failed", "y", "why", None, 5))
    assert Ledger.read(tmp_path) == ledger


def test_foreign_file_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "batch.json").write_text("[1]")
    with pytest.raises(OutputError, match=r"batch\.json"):
        Ledger.read(tmp_path)


def test_locked_folder_refuses_a_second_process(tmp_path: Path) -> None:
    with locked(tmp_path / "out"), pytest.raises(OutputError, match="out"), locked(tmp_path / "out"):
        pass
    with locked(tmp_path / "out"):
        pass
