"""The figures behind the plot of costs, at a small size."""

from __future__ import annotations

from typing import Any

import costs
import pytest


def test_costs_grow_as_they_must(monkeypatch: pytest.MonkeyPatch) -> None:
    def small(family: Any, *changes: str) -> Any:
        return costs.plan(family, "data.resolution_px=128", *changes)

    # So many that a step is what takes most, and neither the VAE nor the text encoder at its turn.
    monkeypatch.setitem(costs.SWEEPS, "train.batch_size", {"sd1": (16, 32)})
    ((_, flops, peak), (_, more_flops, more_peak)) = costs.sweep("train.batch_size", counted=small)["SD 1.5"]
    assert more_flops == pytest.approx(2 * flops, rel=0.001)
    assert more_peak > peak
    monkeypatch.setitem(costs.SWEEPS, "lora.rank", {"sd1": (4, 128)})
    ((_, flops, peak), (_, more_flops, more_peak)) = costs.sweep("lora.rank", counted=small)["SD 1.5"]
    assert flops < more_flops < 1.2 * flops
    assert more_peak > peak
