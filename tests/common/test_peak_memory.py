"""Peak memory since the measurement began."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from sdlora.common.peak_memory import PeakMemory

MIB = 2**20


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux reports it")
def test_peak_memory_includes_freed_memory_until_the_next_measurement() -> None:
    first = PeakMemory()
    before = first.num_bytes()
    if before is None:
        pytest.skip("this system does not let the peak be reset")
    held = np.ones(200 * MIB, dtype=np.uint8)
    del held
    high = first.num_bytes()
    assert high is not None and high - before > 150 * MIB
    later = PeakMemory().num_bytes()
    assert later is not None and later < high - 150 * MIB
