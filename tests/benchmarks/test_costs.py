"""The figures behind the plot of costs, at a small size."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import costs
import pytest
from helpers.tiny import TINY

from sdlora.models.architectures import ARCHITECTURES

# Two levels of Stable Diffusion 1.x, which are counted in a tenth of the time.
TWO_LEVELS = replace(
    TINY["sd1"],
    unet={
        **ARCHITECTURES["sd1"].unet, "block_out_channels": (320, 640), "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    },
)  # fmt: skip


def test_costs_grow_as_they_must(monkeypatch: pytest.MonkeyPatch) -> None:
    def small(family: Any, *changes: str) -> Any:
        return costs.plan(family, "data.resolution_px=128", *changes)

    monkeypatch.setitem(ARCHITECTURES, "sd1", TWO_LEVELS)
    # So many that a step is what takes most, and neither the VAE nor the text encoder at its turn.
    monkeypatch.setitem(costs.SWEEPS, "train.batch_size", {"sd1": (16, 32)})
    ((_, flops, peak), (_, more_flops, more_peak)) = costs.sweep("train.batch_size", counted=small)["SD 1.5"]
    assert more_flops == pytest.approx(2 * flops, rel=0.001)
    assert more_peak > peak
    monkeypatch.setitem(costs.SWEEPS, "lora.rank", {"sd1": (4, 128)})
    ((_, flops, peak), (_, more_flops, more_peak)) = costs.sweep("lora.rank", counted=small)["SD 1.5"]
    assert flops < more_flops < 1.2 * flops
    assert more_peak > peak
