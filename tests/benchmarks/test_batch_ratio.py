"""The program that compares a batch with single runs, at its smallest."""

from __future__ import annotations

from pathlib import Path

import pytest
from batch_ratio import compare


@pytest.mark.slow
def test_two_jobs_together_take_less_than_apart(tmp_path: Path) -> None:
    figures = compare(2, tmp_path, previews=False)
    assert figures["jobs"] == 2
    # The processor's time, since other programs may be waiting for the clock's.
    assert 0 < figures["cpu_ratio"] < 1
    assert len(list((tmp_path / "batch").glob("*/*.safetensors"))) == 2
