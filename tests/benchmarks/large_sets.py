"""What a set of N images costs to cache and to begin with: `python tests/benchmarks/large_sets.py --sizes 500 10000`.

Every size is measured in a process of its own, so that its peak memory is its own. Times are of the processor, which a
busy machine does not lengthen much. Images are of 32 px and the base is of random weights: what is measured is
sdlora's own share, which an encoder of full size would hide.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

STEPS = 5


def make_set(folder: Path, count: int) -> None:
    """Images of noise, each with a caption of its own."""
    folder.mkdir(parents=True)
    noise = np.random.default_rng(0)
    for index in range(count):
        pixels = noise.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:06d}.png", compress_level=1)
        (folder / f"{index:06d}.txt").write_text(f"image number {index}", encoding="utf-8")


def measure(folder: Path, base: Path) -> dict[str, Any]:
    """The figures of a set, in this process."""
    from accelerate import Accelerator

    from sdlora.config.toml import parse_config
    from sdlora.events import EpochDone, StepDone
    from sdlora.run.arguments import make_adapter, training_settings
    from sdlora.run.fill_cache import fill_cache
    from sdlora.run.setup import load
    from sdlora.training.data import make_schedule, training_data
    from sdlora.training.trainer import Trainer

    document = {
        "base": {"path": str(base)},
        "data": {"folder": str(folder), "resolution_px": 32, "bucket_step_px": 8, "validation_split": False},
        "train": {"epochs": 2, "batch_size": 256, "device": "cpu", "precision": "fp32", "log_every_steps": 1},
        "lora": {"rank": 2},
        "copycheck": {"enabled": False},
        "cache": {"dir": str(folder.with_name("cache"))},
    }
    config = parse_config(document, name="large")
    figures: dict[str, Any] = {}
    for name in ("cold", "warm"):
        start = time.process_time()
        for _ in fill_cache(config, 1):
            pass
        figures[f"{name}_cache_seconds"] = time.process_time() - start
    start = time.process_time()
    loaded, settings = load(config), training_settings(config)
    data = training_data(settings, loaded.images.training, loaded.cache)
    for _ in data.fill(config.data.background, make_schedule(settings, loaded.images.training).timesteps):
        pass
    figures["load_seconds"] = time.process_time() - start
    start = time.process_time()
    adapter = make_adapter(config, loaded.base)
    trainer = Trainer(settings, adapter, data, Accelerator(cpu=True))
    figures["plan_seconds"] = time.process_time() - start
    # The first step of the second epoch, against those after it: what is left is the epoch's own beginning.
    events, steps = trainer.events(), list[float]()
    since = time.process_time()
    begun = False
    for event in events:
        if isinstance(event, StepDone) and begun:
            steps.append(time.process_time() - since)
            if len(steps) == STEPS or len(steps) == len(data.dataset.examples) // config.train.batch_size:
                break
        begun = begun or isinstance(event, EpochDone)
        since = time.process_time()
    figures["epoch_start_seconds"] = steps[0]
    figures["later_step_seconds"] = min(steps[1:], default=steps[0])
    figures["peak_rss_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[500, 10_000])
    parser.add_argument("--json", action="store_true", help="print one line of JSON for each size, and nothing else")
    parser.add_argument("--one", nargs=2, type=Path, metavar=("SET", "BASE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(*arguments.one)))
        return
    from helpers.tiny import make_tiny_pipeline

    with tempfile.TemporaryDirectory() as scratch:
        base = Path(scratch) / "base"
        make_tiny_pipeline(base)
        for size in arguments.sizes:
            folder = Path(scratch) / str(size) / "set"
            make_set(folder, size)
            command = [sys.executable, __file__, "--one", str(folder), str(base)]
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            if result.returncode != 0:
                sys.exit(result.stderr)
            figures = json.loads(result.stdout.splitlines()[-1])
            figures["cold_ms_per_picture"] = 1000 * figures["cold_cache_seconds"] / size
            row = {"pictures": size, **{name: round(value, 4) for name, value in figures.items()}}
            print(json.dumps(row) if arguments.json else "\n".join(f"{key}: {value}" for key, value in row.items()))


if __name__ == "__main__":
    main()
