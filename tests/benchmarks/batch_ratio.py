"""One `batch` of N jobs against N calls of `train`: `python tests/benchmarks/batch_ratio.py --jobs 20`.

Both train the same adapters on the same base and images, with a cache of their own that is empty at first. Wall time
is told, and the processor's, which a busy machine does not lengthen much.
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

CONFIG = """
[data]
folder = "builtin:zumi"
trigger = "zumi"
[train]
epochs = 1
batch_size = 4
device = "cpu"
[preview]
enabled = {previews}
num_captions = 1
num_steps = 4
seeds = [0]
[copycheck]
enabled = false
[cache]
dir = "{cache}"
"""


def measured(commands: list[list[str]]) -> tuple[float, float]:
    """Wall seconds and processor seconds of programs, one after the other."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    for command in commands:
        subprocess.run([sys.executable, "-m", "sdlora", *command], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.monotonic() - start, spent


def compare(count: int, folder: Path, *, previews: bool) -> dict[str, float]:
    """The figures of so many jobs."""
    for name in ("apart", "together"):
        text = CONFIG.format(cache=folder / f"cache-{name}", previews=str(previews).lower())
        (folder / f"{name}.toml").write_text(text, encoding="utf-8")
    apart = [
        ["train", str(folder / "apart.toml"), "--set", f"seed={seed}", "--output", str(folder / "runs" / str(seed))]
        for seed in range(count)
    ]
    jobs = folder / "jobs.toml"
    seeds = ", ".join(map(str, range(count)))
    jobs.write_text(f'[defaults]\nconfig = "{folder}/together.toml"\n[sweep]\nseed = [{seeds}]\n', encoding="utf-8")
    apart_wall, apart_cpu = measured(apart)
    together_wall, together_cpu = measured([["batch", str(jobs), "--output", str(folder / "batch")]])
    return {
        "jobs": count,
        "train_wall_seconds": apart_wall,
        "batch_wall_seconds": together_wall,
        "train_cpu_seconds": apart_cpu,
        "batch_cpu_seconds": together_cpu,
        "wall_ratio": together_wall / apart_wall,
        "cpu_ratio": together_cpu / apart_cpu,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=20)
    parser.add_argument("--previews", action="store_true", help="draw previews as well")
    parser.add_argument("--json", action="store_true", help="print one line of JSON and nothing else")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        figures = compare(arguments.jobs, Path(scratch), previews=arguments.previews)
    row = {name: round(value, 3) for name, value in figures.items()}
    print(json.dumps(row) if arguments.json else "\n".join(f"{key}: {value}" for key, value in row.items()))


if __name__ == "__main__":
    main()
