"""The copy check's cost, at a small size: what is counted, not how long it takes here."""

from __future__ import annotations

from pathlib import Path

import copy_cost
import pytest


@pytest.mark.slow
def test_the_second_run_draws_no_null(tmp_path: Path) -> None:
    found = copy_cost.measure(tmp_path, "preview.num_steps=1")
    assert found["null_pictures"][0] >= 24 and found["null_pictures"][1] == 0
    assert found["null_seconds"][1] == 0.0 < found["null_seconds"][0]
    assert found["previews"] == 7
    assert all(seconds > 0 for name in ("previews_seconds", "check_seconds") for seconds in found[name])
    assert found["share"] > 0
