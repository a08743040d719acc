"""How noisy the adapter's gradient is, at a frozen and briefly trained adapter, by batch size and coverage.

The gradients are those of real, consecutive batches of a plan: the trainer takes its own steps at a learning rate too
small to change a float32, and what it is about to step with is caught. 256 gradients each: eight consecutive ones
from a random place in each of 32 plans of other seeds, so that pairs from different plans are independent.

256 gradients leave wide intervals, because their lengths differ so much. So the inner products of 1024 gradients of
single images, binned by timestep, are measured too: what coverage changes is which timesteps meet in a batch, and
how often they do is known exactly from the plan (`estimates.expected_gain`).

    python tests/benchmarks/gradient_noise.py results.jsonl --json
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from concepts import CONCEPTS, NUM_TRAINING, write_all
from estimates import expected_gain, noise_ratio
from results import Cell, run_missing, share
from setting import make_config, prepare, recipe, silence
from torch import Tensor

from sdlora.common import seeds
from sdlora.config.schema import RunConfig
from sdlora.data.batches import epoch_batches
from sdlora.diffusion.timesteps import Density, cover
from sdlora.run.arguments import training_settings
from sdlora.training.trainer import Trainer

NUM_PLANS, BATCHES_PER_PLAN = 32, 8
BATCH_SIZES, COVERAGES = (1, 2, 4, 8), ("none", "batch", "image")
NUM_BINS, LEVEL_PLANS, LEVEL_BATCHES = 20, 64, 16
RANK, WARM_REPEATS, PLAN_REPEATS = 16, 8, 6


def plan_gradients(parts: Any, config: RunConfig, num_batches: int) -> tuple[Tensor, list[list[int]]]:
    """The gradients of consecutive batches from a random place in a plan, (num_batches, d), and their timesteps.

    The adapter is left as it is.
    """
    frozen = config.train.model_copy(update={"learning_rate": 1e-30, "max_grad_norm": 0.0, "lr_schedule": "constant"})
    config = config.model_copy(update={"train": frozen})
    examples = tuple(replace(e, repeats=config.data.sets[0].repeats) for e in parts.data.dataset.examples)
    data = replace(parts.data, dataset=replace(parts.data.dataset, examples=examples))
    trainer = Trainer(training_settings(config), parts.adapter, data, Accelerator(cpu=True))
    for _ in data.fill(config.data.background, trainer.schedule.timesteps):
        pass
    first = seeds.derive(config.seed, "benchmark place") % (trainer.total_steps - num_batches + 1)
    trainer.position.step = first
    caught: list[Tensor] = []

    def catch(*_: Any) -> None:
        found = [p.grad if p.grad is not None else torch.zeros_like(p) for p in trainer.step.parameters]
        caught.append(torch.cat([gradient.flatten() for gradient in found]))

    trainer.step.optimizer.optimizer.register_step_pre_hook(catch)
    for _ in trainer.events(lambda: len(caught) >= num_batches):
        if len(caught) >= num_batches:
            break
    return torch.stack(caught), plan_timesteps(trainer)[first : first + num_batches]


def plan_timesteps(trainer: Trainer) -> list[list[int]]:
    """The timesteps of every step of a trainer's plan."""
    groups = [group for epoch in trainer.schedule.epochs for group in epoch]
    return [[trainer.schedule.timesteps[exposure] for batch in group for exposure in batch] for group in groups]


def gram(gradients: Sequence[Tensor]) -> Tensor:
    """Inner products of all gradients, float64; summed in pieces, for together they fill the memory twice."""
    stacked = torch.cat(list(gradients))
    total = torch.zeros(len(stacked), len(stacked), dtype=torch.float64)
    for piece in stacked.split(1 << 15, dim=1):
        wide = piece.double()
        total += wide @ wide.T
    return total


def warm_parts(base: str, sets: Path, concept: str, folder: Path, *, repeats: int = WARM_REPEATS) -> Any:
    """A run's parts after one short epoch, so that B is not zero; every caption it may meet is encoded."""
    parts = prepare(make_config(base, sets, concept, 0, recipe(RANK, repeats, epochs=1)), folder)
    for _ in parts.trainer.events():
        pass
    return parts


def plan_config(parts: Any, plan: int, batch_size: int, coverage: str) -> RunConfig:
    """The configuration of a plan of its own."""
    data = parts.config.data.model_copy(update={"raw_repeats": PLAN_REPEATS})
    train = parts.config.train.model_copy(update={"batch_size": batch_size, "epochs": 4})
    timesteps = parts.config.timesteps.model_copy(update={"coverage": coverage})
    changes = {"seed": 1000 + plan, "data": data, "train": train, "timesteps": timesteps}
    config: RunConfig = parts.config.model_copy(update=changes)
    return config


def measure(parts: Any, batch_size: int, coverage: str, *, num_plans: int, num_batches: int) -> dict[str, Any]:
    """The noise ratios of one batch size and coverage."""
    gradients = [
        plan_gradients(parts, plan_config(parts, plan, batch_size, coverage), num_batches)[0]
        for plan in range(1, num_plans + 1)
    ]
    plans = [plan for plan in range(num_plans) for _ in range(num_batches)]
    found = noise_ratio(gram(gradients), plans)
    return {"num_gradients": len(plans), **{name: list(estimate) for name, estimate in found.items()}}


def meetings(coverage: str, batch_size: int, num_seeds: int = 20) -> Tensor:
    """How often two members of a step are in each pair of bins of timesteps, in plans of the sets' size, (K, K)."""
    counts = torch.zeros(NUM_BINS, NUM_BINS, dtype=torch.float64)
    density = Density("uniform")
    for seed in range(num_seeds):
        epochs = (epoch_batches([[0]] * NUM_TRAINING, PLAN_REPEATS, batch_size, e, seed) for e in range(1, 5))
        steps = [
            [(str(exposure.example), exposure.number) for exposure in batch] for epoch in epochs for batch in epoch
        ]
        for drawn in cover(coverage, steps, seed):
            present = _one_hot(torch.tensor([density.timestep(draw) for draw in drawn])).sum(dim=0)
            counts += torch.outer(present, present) - present.diag()
    return counts / counts.sum()


def _one_hot(timesteps: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(timesteps * NUM_BINS // 1000, NUM_BINS).double()


def measure_levels(parts: Any, *, num_plans: int, num_batches: int) -> dict[str, Any]:
    """How many times less noise coverage makes, from single gradients' inner products by bins of timesteps."""
    made = [plan_gradients(parts, plan_config(parts, 2000 + plan, 1, "none"), num_batches) for plan in range(num_plans)]
    products = gram([gradients for gradients, _ in made])
    bins = _one_hot(torch.tensor([t for _, steps in made for (t,) in steps]))
    plans = [plan for plan in range(num_plans) for _ in range(num_batches)]
    gains = {
        coverage: {
            size: list(expected_gain(products, bins, plans, meetings(coverage, size), size))
            for size in BATCH_SIZES
            if size > 1
        }
        for coverage in COVERAGES
        if coverage != "none"
    }
    return {"num_gradients": len(plans), "gains": gains}


def all_cells() -> list[Cell]:
    """Concept after concept, so that the warm adapter is trained once."""
    cells: list[Cell] = []
    for concept in CONCEPTS:
        cells.append({"part": "levels", "concept": concept})
        cells += [
            {"part": "noise", "concept": concept, "batch_size": size, "coverage": coverage}
            for size in BATCH_SIZES
            for coverage in COVERAGES
        ]
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("--base", default="pocket")
    parser.add_argument("--share", default="0/1", help="which part of the concepts this process takes")
    parser.add_argument("--json", action="store_true", help="print every finished cell")
    arguments = parser.parse_args()
    silence()
    mine = {cell["concept"] for cell in share([{"concept": name} for name in CONCEPTS], arguments.share)}
    with tempfile.TemporaryDirectory() as folder:
        write_all(Path(folder))
        warm: dict[str, Any] = {}

        def measured(cell: Cell) -> dict[str, Any]:
            if cell["concept"] not in warm:
                warm.clear()
                warm[cell["concept"]] = warm_parts(arguments.base, Path(folder), cell["concept"], Path(folder) / "run")
            parts = warm[cell["concept"]]
            if cell["part"] == "levels":
                return measure_levels(parts, num_plans=LEVEL_PLANS, num_batches=LEVEL_BATCHES)
            return measure(
                parts, cell["batch_size"], cell["coverage"], num_plans=NUM_PLANS, num_batches=BATCHES_PER_PLAN
            )

        cells = [cell for cell in all_cells() if cell["concept"] in mine]
        run_missing(arguments.results, cells, measured, show=print if arguments.json else lambda line: None)


if __name__ == "__main__":
    main()
