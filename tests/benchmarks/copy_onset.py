"""Does the copy check find the epoch at which copying begins, is it silent where nothing is copied, is its epoch best?

Part "oracle" examines the oracle (`copy_oracle.py`), which knows the world and not the check. Part "onset" over-trains
on four images on purpose; the oracle says how many images really are copies after each epoch, and the judge
(`classifier.py`) how many show the concept. The last adapter is then checked against validation images, which it cannot
have copied: in the previews of its own run, and asked for the validation captions. Part "tenth" trains the same at a
tenth of the rate, part "many" on all 24 images for as many steps. Everything is the product's own: `sdlora.run.run`,
its previews and its scores; the report asks it for verdicts and for its choice of an epoch.

    python tests/benchmarks/copy_onset.py results.jsonl --judge judge.pt --oracle oracle.pt --json
    python tests/benchmarks/copy_onset.py --report results.jsonl --page docs/measurements/copy-check.md

Every finished cell is kept; a second process may work on the rest with --share 0/2 and --share 1/2. Runs that are kept
in --work are not trained again; --recheck compares their previews anew, after a change of the check.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import warnings
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import copy_onset_report
from classifier import ALL_KINDS, Judge, look
from classifier import load_or_train as load_judge
from concepts import ALL_CONCEPTS, FEW, NUM_FEW, NUM_TRAINING, OTHER_SCENES, Concept
from copy_onset_report import REGISTERED
from copy_oracle import Oracle, Witness, examine
from copy_oracle import load_or_train as load_oracle
from generate import GUIDANCE, draw, load_pipeline
from PIL import Image
from results import Cell, run_missing, share
from setting import make_config, silence

from sdlora.common.bundled import pocket_folder
from sdlora.config.schema import RunConfig
from sdlora.copycheck.checker import Checker
from sdlora.copycheck.signals import Signal
from sdlora.events import EpochDone
from sdlora.lora_files.read import read_file
from sdlora.pocket.pen import SIZE_PX
from sdlora.run import run, setup
from sdlora.run.arguments import make_adapter
from sdlora.run.check_file import check_file
from sdlora.run.preview_requests import preview_request

SEEDS = (0, 1, 2)
PARTS = ("oracle", "onset", "tenth", "many")


@dataclass(frozen=True)
class Scale:
    """How much is trained and drawn; smaller in the tests.

    Attributes:
        rank: Of the adapter, on every layer of the UNet.
        repeats: Exposures per epoch of each of the four images; a sixth of them where there are 24.
        learning_rate: Constant.
        epochs: How many.
        num_steps: Denoising steps of every image.
        num_truth: Images drawn after an epoch for the oracle, beside the previews: half from training captions,
            half from prompts that are in no caption.
    """

    rank: int = 32
    repeats: int = 42
    learning_rate: float = 2e-3
    epochs: int = 5
    num_steps: int = 10
    num_truth: int = 24


def all_cells(parts: list[str], seeds: list[int]) -> list[Cell]:
    """Seed after seed and part after part, so that what is there after half of the time is whole for fewer seeds."""
    return [
        {"part": part, "concept": concept, "seed": seed}
        for seed in seeds
        for part in parts
        for concept in ALL_CONCEPTS
        if part != "oracle" or seed == 0
    ]


@dataclass(frozen=True)
class Bench:
    """Where and with what the cells are measured.

    Attributes:
        base: The base's folder.
        folder: Where sets, cache and runs lie.
        scale: How much is measured.
        judge: It has to know all concepts.
        oracle: Tells copies.
        keep: Whether the runs' folders are kept, by the names of their cells.
        recheck: Whether the previews of kept runs are compared anew.
    """

    base: Path
    folder: Path
    scale: Scale
    judge: Judge
    oracle: Oracle
    keep: bool = False
    recheck: bool = False

    def measure(self, cell: Cell) -> dict[str, Any]:
        """What the oracle is worth; or every epoch of a run: the check, the losses and what is true."""
        concept = ALL_CONCEPTS[cell["concept"]]
        if cell["part"] == "oracle":
            return {"copies": examine(self.oracle, load_pipeline(self.base), concept)}
        over_trained = cell["part"] == "onset"
        output = self.folder / "runs" / f"{concept.name}_{cell['seed']}_{cell['part']}"
        epochs = self._train(cell, output)
        indices = range(NUM_TRAINING if cell["part"] == "many" else NUM_FEW)
        witness = Witness(self.oracle, concept, indices)
        for row in epochs:
            row["check"] = read_check(output / "epochs" / str(row["epoch"]))
            # Controls are looked at once, at their end, to be sure that there is nothing to be found.
            if over_trained or row["epoch"] == self.scale.epochs:
                row |= self._truth(concept, witness, output, row["epoch"])
        figures: dict[str, Any] = {"epochs": epochs}
        if over_trained:
            figures["own_previews_check"] = self.own_previews_against_validation(cell, output)
            figures["heldout_check"] = self._against_validation(cell, output)
        if not self.keep:
            shutil.rmtree(output)
        return figures

    def _train(self, cell: Cell, output: Path) -> list[dict[str, Any]]:
        """Run the product; the losses of every epoch. A kept run is not run again."""
        kept = output / "trained.json"
        if kept.exists():
            if self.recheck:
                self._check_again(self._config(cell), output)
            return list(json.loads(kept.read_text(encoding="utf-8")))
        shutil.rmtree(output, ignore_errors=True)
        rows = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for event in run.start(self._config(cell), output):
                if isinstance(event, EpochDone) and event.epoch > 0:
                    losses = {"train_loss": event.train_loss, "heldout_loss": event.validation_loss}
                    rows.append({"epoch": event.epoch, **losses})
        kept.write_text(json.dumps(rows), encoding="utf-8")
        return rows

    def _check_again(self, config: RunConfig, output: Path) -> None:
        checker = _checker(config, config)
        for folder in sorted((output / "epochs").iterdir()):
            before = json.loads((folder / "copycheck.json").read_text(encoding="utf-8"))["signals"]
            signals = [
                Signal(name, found["value"], found["p_value"], found["meaning"])
                for name, found in before.items()
                if name != REGISTERED
            ]
            # It needs nothing but the previews, so a run that was checked before there was this sign gets it, too.
            checker.compare(folder, [*signals, checker.registered_similarity(folder)] if folder.name != "0" else [])

    def _config(self, cell: Cell) -> RunConfig:
        scale, concept = self.scale, ALL_CONCEPTS[cell["concept"]]
        if not (self.folder / concept.name / OTHER_SCENES).exists():
            concept.write(self.folder / concept.name)
        many = cell["part"] == "many"
        return make_config(str(self.base), self.folder, concept.name, cell["seed"], {
            "data": {
                "folder": str(self.folder / concept.name / ("" if many else FEW)),
                "repeats": max(1, scale.repeats * NUM_FEW // NUM_TRAINING) if many else scale.repeats,
            },
            "lora": {
                "rank": scale.rank, "alpha": scale.rank,
                "targets": ["cross_attention", "self_attention", "mlp", "projection", "conv"],
            },
            "train": {
                "batch_size": 2, "epochs": scale.epochs, "device": "cpu", "precision": "fp32",
                "learning_rate": scale.learning_rate / (10 if cell["part"] == "tenth" else 1),
            },
            "preview": {"prompts": concept.prompts(3), "num_steps": scale.num_steps, "guidance": GUIDANCE},
        })  # fmt: skip

    def _truth(self, concept: Concept, witness: Witness, output: Path, epoch: int) -> dict[str, Any]:
        """Copies among an epoch's images, as [copies, images] by kind of prompt, and how many show the concept."""
        folder = output / "epochs" / str(epoch)
        previews = json.loads((folder / "copycheck.json").read_text(encoding="utf-8"))["previews"]
        captions = list(dict.fromkeys(preview["prompt"] for preview in previews if preview["kind"] == "training"))
        half = self.scale.num_truth // 2
        prompts = [captions[i % len(captions)] for i in range(half)] + concept.prompts(half)
        pipeline = load_pipeline(self.base)
        pipeline.load_lora_weights(next(folder.glob("*.safetensors")))
        drawn = draw(pipeline, prompts, guidance=GUIDANCE, steps=self.scale.num_steps, seed=7000)
        kinds = ["training"] * half + ["novel"] * half + [preview["kind"] for preview in previews]
        images = [image.resize((SIZE_PX, SIZE_PX)) for image in drawn]
        for preview in previews:
            with Image.open(folder / preview["file"]) as image:
                images.append(image.convert("RGB").resize((SIZE_PX, SIZE_PX)))
        copies = witness.copies(images)
        seen = [verdict.kind == concept.name for verdict in look(self.judge, images)]

        def count(found: list[bool], kind: str) -> list[int]:
            return [sum(f for f, k in zip(found, kinds, strict=True) if k == kind), kinds.count(kind)]

        return {
            "copies": {kind: count(copies, kind) for kind in ("training", "novel")},
            "accepted": count(seen, "novel"),
            "preview_copies": copies[2 * half :],
            "preview_accepted": seen[2 * half :],
        }

    def _untrained(self, cell: Cell, part: str) -> RunConfig:
        """A run's settings, but with images that were never trained on, in a subfolder of its concept."""
        config = self._config(cell)
        folder = str(self.folder / cell["concept"] / part)
        data = config.data.model_copy(
            update={"raw_folder": folder, "validation_folder": None, "validation_split": False}
        )
        return config.model_copy(update={"data": data})

    def own_previews_against_validation(self, cell: Cell, output: Path) -> dict[str, Any]:
        """The last epoch's previews, compared with images whose scenes were never trained."""
        target = output / "own_previews_check"
        previews = output / "epochs" / str(self.scale.epochs) / "previews"
        shutil.copytree(previews, target / "previews", dirs_exist_ok=True)
        _checker(self._config(cell), self._untrained(cell, OTHER_SCENES)).compare(target, [])
        return read_check(target)

    def _against_validation(self, cell: Cell, output: Path) -> dict[str, Any]:
        """What `sdlora check` says of the last adapter and all validation images, drawing their captions."""
        file = read_file(next((output / "epochs" / str(self.scale.epochs)).glob("*.safetensors")))
        target = output / "heldout_check"
        deque(check_file(file, self._untrained(cell, "holdout"), target), maxlen=0)
        return read_check(target)


def _checker(drawn: RunConfig, compared: RunConfig) -> Checker:
    """What compares the previews of one run's settings with the images of another's."""
    loaded = setup.load(compared)
    base = loaded.base
    adapter = make_adapter(compared, base)
    request = preview_request(drawn.preview, setup.load(drawn).images.training)
    checker = setup.make_checker(compared, loaded, adapter, request, None)
    deque(checker.prepare(compared.data.background), maxlen=0)
    return checker


def read_check(folder: Path) -> dict[str, Any]:
    """What of a folder's copycheck.json a verdict follows from, see `copy_onset_report.judged`."""
    found = json.loads((folder / "copycheck.json").read_text(encoding="utf-8"))
    return {
        "previews": [
            [preview["kind"], preview["hp_ms"], preview["phash"], round(preview["p_value"], 4)]
            for preview in found["previews"]
        ],
        "outside": sorted(name for name, signal in found["signals"].items() if signal["outside"]),
        **{name: round(signal["p_value"], 4) for name, signal in found["signals"].items() if name == REGISTERED},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="?", help="the file of finished cells, a JSON line each")
    parser.add_argument("--part", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--share", default="0/1", help="which part of the cells this process takes")
    parser.add_argument("--base", type=Path, default=pocket_folder())
    parser.add_argument("--judge", type=Path, help="where the judge of all concepts is kept between calls")
    parser.add_argument("--oracle", type=Path, help="where the oracle is kept between calls")
    parser.add_argument("--work", type=Path, help="where runs and cache are kept; a temporary folder if left out")
    parser.add_argument("--recheck", action="store_true", help="compare the previews of kept runs anew")
    parser.add_argument("--json", action="store_true", help="print every finished cell")
    parser.add_argument("--report", type=Path, help="write the tables of these results instead")
    parser.add_argument("--page", type=Path, default=Path("docs/measurements/copy-check.md"))
    arguments = parser.parse_args()
    if arguments.report:
        copy_onset_report.write(arguments.report, arguments.page)
        return
    if arguments.results is None:
        parser.error("name the file of results")
    silence()
    judge, oracle = load_judge(arguments.judge, ALL_KINDS), load_oracle(arguments.oracle)
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.work or Path(temporary)
        bench = Bench(arguments.base, folder, Scale(), judge, oracle, arguments.work is not None, arguments.recheck)
        cells = share(all_cells(arguments.part, arguments.seeds), arguments.share)
        run_missing(arguments.results, cells, bench.measure, show=print if arguments.json else lambda line: None)


if __name__ == "__main__":
    main()
