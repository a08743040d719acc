"""Counts of the lean step at the families' true shapes: they are the same on every machine, so they are exact."""

from __future__ import annotations

import pytest
import step
import torch
from counts import KernelCounter
from step import Counts

from sdlora.estimate.meta_model import shapes_of_family

# Of PEFT with adapters in float32 under autocast, counted below where --slow is given.
PEFT_MIB = {"sd1": 857.094, "sdxl": 6195.0}
FORMULA_GFLOP = {"sd1": 1718, "sdxl": 14126}


def counts(name: str, family: str, edge: int) -> Counts:
    return step.count(name, shapes_of_family(family), 8 * edge)  # type: ignore[arg-type]


def test_stable_diffusion_1_at_512_px() -> None:
    floor, own = counts("floor", "sd1", 64), counts("sdlora", "sd1", 64)
    assert own.gflop == pytest.approx(FORMULA_GFLOP["sd1"], rel=0.005)
    assert (floor.kernels, own.kernels) == (1407, 1793)
    assert own.kernels / floor.kernels <= 1.40
    assert own.saved_mib == pytest.approx(503.650, abs=0.001)
    assert own.saved_mib / PEFT_MIB["sd1"] <= 0.62


@pytest.mark.slow
def test_stable_diffusion_xl_at_1024_px() -> None:
    floor, own = counts("floor", "sdxl", 128), counts("sdlora", "sdxl", 128)
    assert own.gflop == pytest.approx(FORMULA_GFLOP["sdxl"], rel=0.005)
    assert own.kernels / floor.kernels <= 1.60
    assert own.saved_mib / PEFT_MIB["sdxl"] <= 0.68


@pytest.mark.slow
def test_peft_keeps_what_it_is_compared_with() -> None:
    found = counts("peft fp32 + autocast", "sd1", 64)
    assert found.saved_mib == pytest.approx(PEFT_MIB["sd1"], rel=0.001)
    assert found.kernels > counts("peft bf16", "sd1", 64).kernels


def test_kernels_are_counted_without_views() -> None:
    layer, x = torch.nn.Linear(30, 50, device="meta").requires_grad_(False), torch.empty(7, 30, device="meta")
    with KernelCounter() as counter:
        layer(x.requires_grad_()).view(-1).unsqueeze(0).sum().backward()
    # Product and sum; on the way back the ones that begin it, and the product. Views compute nothing.
    assert counter.kernels == 4


def test_steps_really_run_and_take_turns() -> None:
    found = step.time_reduced("sd1", torch.float32, repeats=1)
    assert set(found) == {"floor", "peft bf16", "sdlora"}
    assert all(len(values) == 1 and values[0] > 0 for values in found.values())
