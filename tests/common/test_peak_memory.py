"""Peak memory is that since the measurement began."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from sdlora.common.peak_memory import PeakMemory

MIB = 2**20


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells it")
def test_it_sees_what_was_held_meanwhile_and_forgets_what_was_before() -> None:
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
