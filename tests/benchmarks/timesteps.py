"""Which noise levels to train, how evenly and with what weight: equal steps, paired by concept and seed.

Part "loss" trains every variant at a constant rate and follows the unweighted validation loss in five bands. Part
"copy" over-trains six of them on purpose (few images, high rank, many exposures) and draws after every epoch: fidelity
is the share of images from new prompts that the judge accepts. A copy is an image drawn from a training caption
that looks more like the training images than like any of 19 other sets of fresh renders of the same captions; one
that has only learned what the captions say would be called a copy one time in twenty.

    python tests/benchmarks/timesteps.py results.jsonl --judge judge.pt --json
    python tests/benchmarks/timesteps.py --report results.jsonl --docs docs/measurements

Every finished cell is kept; a second process may work on the rest with --share 0/2 and --share 1/2.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timesteps_report
import torch
from accelerate import Accelerator
from classifier import Judge, load_or_train, look
from concepts import CONCEPTS, FEW, NUM_FEW, Concept, write_all
from generate import GUIDANCE
from PIL import Image
from results import Cell, run_missing, share
from setting import draw_images, make_config, prepare, recipe, silence, validation, watch
from variants import COPY_VARIANTS, Recipe, variants

from sdlora.copycheck.similarity import hp_ms
from sdlora.pocket.pen import SIZE_PX
from sdlora.run.arguments import training_settings
from sdlora.training.trainer import Trainer

SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Scale:
    """How much is measured; smaller in the tests.

    Attributes:
        rank: Of the adapter, in part "loss"; `copy_rank` in part "copy".
        repeats: Exposures of every image per epoch, four epochs long; `copy_repeats` in part "copy".
        copy_learning_rate: Of part "copy", twice as high as in part "loss".
        point_steps: The validation loss is measured this often.
        num_pictures: Drawn after an epoch from new prompts, and as many from training captions.
        num_steps: Denoising steps of each.
        strangers: Sets of fresh renders that an image's similarity to the training images is compared with.
    """

    rank: int = 16
    repeats: int = 4
    point_steps: int = 32
    copy_rank: int = 64
    copy_repeats: int = 60
    copy_learning_rate: float = 2e-3
    num_images: int = 16
    num_steps: int = 10
    strangers: int = 19


def all_cells(parts: list[str], seeds: list[int]) -> list[Cell]:
    """Seed after seed, so that what is there after half of the time is whole for fewer seeds."""
    cells: list[Cell] = []
    for seed in seeds:
        for part, names in (("loss", tuple(variants(Scale.rank))), ("copy", COPY_VARIANTS)):
            if part in parts:
                cells += [
                    {"part": part, "concept": concept, "seed": seed, "variant": name}
                    for concept in CONCEPTS
                    for name in names
                ]
    return cells


@dataclass(frozen=True)
class Bench:
    """Where and with what the cells are measured."""

    base: str
    folder: Path
    scale: Scale
    judge: Judge | None

    def measure(self, cell: Cell) -> dict[str, Any]:
        """A cell's figures."""
        return {"loss": self.loss, "copy": self.copy}[cell["part"]](cell)

    def loss(self, cell: Cell) -> dict[str, Any]:
        """Held-out bands all along a run of ordinary size, and what drawing its noise levels costs."""
        rank = self.scale.rank
        parts = self._prepare(
            cell, rank, self.scale.repeats, {"train": {"checkpoint_every_steps": self.scale.point_steps}}
        )
        curve: dict[int, list[float]] = {}
        seconds: list[float] = []

        def at_point(step: int) -> None:
            curve[step] = validation(parts)

        planning = seconds_to_plan(parts)
        watch(parts, at_point=at_point, at_epoch=lambda epoch: None, seconds=seconds)
        return {
            "curve": [[step, bands] for step, bands in sorted(curve.items())],
            "step_seconds": sorted(seconds)[len(seconds) // 2],
            "planning_seconds": planning,
        }

    def copy(self, cell: Cell) -> dict[str, Any]:
        """Fidelity, copy scores and validation bands after every epoch of an over-trained run."""
        scale, concept = self.scale, CONCEPTS[cell["concept"]]
        few = {
            "data": {"folder": str(self.folder / concept.name / FEW)},
            "train": {"learning_rate": scale.copy_learning_rate},
        }
        parts = self._prepare(cell, scale.copy_rank, scale.copy_repeats, few)
        captions = [concept.training_captions()[i % NUM_FEW] for i in range(scale.num_images)]
        epochs: list[dict[str, Any]] = []

        def at_epoch(epoch: int) -> None:
            drawn = self._draw(parts, concept.prompts(scale.num_images))
            assert self.judge is not None, "part copy needs the judge"
            accepted = sum(verdict.kind == concept.name for verdict in look(self.judge, drawn))
            taught = self._draw(parts, captions)
            scores, *others = (best_scores(concept, taught, take) for take in range(scale.strangers + 1))
            strangers = torch.stack(others)
            epochs.append({
                "epoch": epoch,
                "fidelity": accepted / len(drawn),
                "scores": [round(score, 4) for score in scores.tolist()],
                "stranger_scores": [round(score, 4) for score in strangers.amax(dim=0).tolist()],
                "excess": round(float((scores - strangers.mean(dim=0)).mean()), 4),
                "bands": validation(parts),
            })  # fmt: skip

        watch(parts, at_point=lambda step: None, at_epoch=at_epoch)
        return {"epochs": epochs}

    def _prepare(self, cell: Cell, rank: int, repeats: int, more: Recipe) -> Any:
        config = make_config(
            self.base, self.folder, cell["concept"], cell["seed"], recipe(rank, repeats), more,
            variants(rank)[cell["variant"]],
        )  # fmt: skip
        return prepare(config, self.folder / "run")

    def _draw(self, parts: Any, prompts: list[str]) -> list[Image.Image]:
        drawn = draw_images(parts.base, prompts, guidance=GUIDANCE, steps=self.scale.num_steps)
        return [image.resize((SIZE_PX, SIZE_PX)) for image in drawn]


def best_scores(concept: Concept, images: list[Image.Image], take: int = 0) -> torch.Tensor:
    """How much each image looks like the image of the set that it is most like, (P,).

    Args:
        concept: Whose training captions.
        images: P of them.
        take: 0 compares with the training images; another with fresh renders, which nobody can have copied.
    """
    gallery = [concept.draw(index, take)[0] for index in range(NUM_FEW)]
    return hp_ms(images, gallery).amax(dim=1)


def seconds_to_plan(parts: Any) -> float:
    """What making a trainer takes per step of its run: it plans all batches and draws all noise levels at once."""
    start = time.perf_counter()
    trainer = Trainer(training_settings(parts.config), parts.adapter, parts.data, Accelerator(cpu=True))
    return (time.perf_counter() - start) / trainer.total_steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="?", help="the file of finished cells, a JSON line each")
    parser.add_argument("--part", nargs="+", default=["loss", "copy"])
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--share", default="0/1", help="which part of the cells this process takes")
    parser.add_argument("--base", default="pocket")
    parser.add_argument("--judge", type=Path, help="where the judge is kept between calls")
    parser.add_argument("--json", action="store_true", help="print every finished cell")
    parser.add_argument("--report", type=Path, help="make tables and plots of these results instead")
    parser.add_argument("--docs", type=Path, default=Path("docs/measurements"))
    arguments = parser.parse_args()
    if arguments.report:
        timesteps_report.write(arguments.report, arguments.docs)
        return
    if arguments.results is None:
        parser.error("name the file of results")
    silence()
    judge = load_or_train(arguments.judge) if "copy" in arguments.part else None
    with tempfile.TemporaryDirectory() as folder:
        write_all(Path(folder))
        bench = Bench(arguments.base, Path(folder), Scale(), judge)
        cells = share(all_cells(arguments.part, arguments.seeds), arguments.share)
        run_missing(arguments.results, cells, bench.measure, show=print if arguments.json else lambda line: None)


if __name__ == "__main__":
    main()
