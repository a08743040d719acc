"""Plans against what whole runs hold, for two of the benchmark's configurations."""

from __future__ import annotations

import sys

import pytest
from memory import CONFIGURATIONS, run_all


def test_there_are_ten_configurations_or_more() -> None:
    assert len(CONFIGURATIONS) >= 10


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells what is held")
def test_a_run_holds_what_was_planned() -> None:
    for name, row in run_all(["as it is", "int8 weights"]).items():
        assert 0.98 <= row["planned"] / row["measured"] <= 1.05, name
