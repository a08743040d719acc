"""The price of looking: what previews, validation and the copy check take beside the training itself.

    python tests/benchmarks/copy_cost.py             the presets for SD 1.5 and SDXL, counted at true shapes
    python tests/benchmarks/copy_cost.py --run       the quickstart, run: seconds
    python tests/benchmarks/copy_cost.py --images N  the scale of N images of 384 px: seconds of one core

Twenty images are assumed, two of them for validation. "formerly" counts twelve previews of 25 steps, twice as many
probes, and the 80 images that the base model drew before training, to compare previews with.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from setting import silence

from sdlora.config.toml import load_config
from sdlora.copycheck.embedders import Embedders
from sdlora.copycheck.scale import PHASE, num_compared
from sdlora.copycheck.signals import MAX_COMPARED, MAX_PROBED
from sdlora.estimate.hints import with_values
from sdlora.estimate.meta_model import shapes_of_family
from sdlora.events import CopyChecked, PreviewsDone, Progress, StepDone
from sdlora.run.estimate import estimate_shapes, looking_share
from sdlora.run.run import start

PRESETS = {"sd15-character": "sd1", "sdxl-character": "sdxl"}
TRAINED, HELD = 18, 2
FORMER_PREVIEWS, FORMER_STEPS, FORMER_DRAWN = 12, 25, 80
MOST = 0.25


def counted(preset: str) -> dict[str, float]:
    """Shares of the training's arithmetic: now, and formerly."""
    config = load_config(preset, ["data.folder=none"])
    found = estimate_shapes(config, PRESETS[preset], None)  # type: ignore[arg-type]
    exposures = TRAINED * (config.train.exposures or 0)
    previews = (config.preview.num_captions + 3) * len(config.preview.seeds)
    edge = shapes_of_family(PRESETS[preset]).resolution_px  # type: ignore[arg-type]
    share = looking_share(found, config, TRAINED, HELD, previews, exposures, compared_px=edge)
    training = exposures * found.flops_per_step / config.train.batch_size
    former = with_values(config, {"preview.num_steps": FORMER_STEPS})
    before = looking_share(found, former, TRAINED, HELD, FORMER_PREVIEWS, exposures)
    # The signals asked four times as often for as many captions and images again.
    before += (config.train.epochs + 1) * (4 * MAX_PROBED + 10 * MAX_COMPARED) * found.flops_per_prediction / training
    drawing = 2 * FORMER_STEPS * found.flops_per_prediction + found.flops_per_decoding
    return {"training_pflop": training / 1e15, "now": share, "formerly": before + FORMER_DRAWN * drawing / training}


def timed(folder: Path, *changes: str) -> dict[str, Any]:
    """Seconds of a quickstart's steps, and of all looking: the scale, previews and checks."""
    config = load_config("quickstart", [f"cache.dir={folder / 'cache'}", *changes])
    found = {"training": 0.0, "scale": 0.0, "previews": 0.0, "check": 0.0}
    last = time.monotonic()
    for event in start(config, folder / "run"):
        now = time.monotonic()
        if isinstance(event, Progress) and event.phase == PHASE:
            found["scale"] += now - last
        elif isinstance(event, PreviewsDone):
            found["previews"] += event.seconds
        elif isinstance(event, CopyChecked):
            found["check"] += event.seconds
        elif isinstance(event, StepDone):
            found["training"] += event.seconds
        last = now
    looking = found["scale"] + found["previews"] + found["check"]
    return {**{name: round(seconds, 2) for name, seconds in found.items()}, "share": looking / found["training"]}


def scale_seconds(num_images: int) -> float:
    """Seconds of one core for comparing the images of a set with each other."""
    draw = np.random.default_rng(0)
    images = [Image.fromarray(draw.integers(0, 256, (384, 384, 3), dtype=np.uint8)) for _ in range(num_images)]
    torch.set_num_threads(1)
    start = time.process_time()
    Embedders().scores(images[: num_compared(num_images)], images)
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("changes", nargs="*", metavar="SECTION.KEY=VALUE", help="of the quickstart's configuration")
    parser.add_argument("--run", action="store_true", help="run the quickstart and take its seconds")
    parser.add_argument("--images", type=int, help="time the scale of so many images instead")
    arguments = parser.parse_args()
    silence()
    if arguments.images:
        print(f"{scale_seconds(arguments.images):.1f} s")
        return
    if arguments.run:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(timed(Path(folder), *arguments.changes)))
        return
    print("| Preset | training, PFLOP | looking, formerly | looking now |\n| --- | --- | --- | --- |")
    for preset in PRESETS:
        found = counted(preset)
        print(f"| {preset} | {found['training_pflop']:.2f} | {found['formerly']:.0%} | {found['now']:.1%} |")


if __name__ == "__main__":
    main()
