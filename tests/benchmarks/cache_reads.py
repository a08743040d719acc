"""What a read from the cache costs the processor: `python tests/benchmarks/cache_reads.py --sizes 500 10000`.

Moments of 512 px images (64 KiB each) are put together into batches of 16 in random order, by
`sdlora.cache.tensors.Cache`. The same batches from as many tensors of this process's own memory (1000 at most) are what
no cache can be without; for comparison, reads that open the file each time. Times are of the processor, in one process.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from large_sets import make_set
from safetensors.torch import load_file
from torch import Tensor

from sdlora.cache.tensors import Cache
from sdlora.common.bundled import BucketOptions, ImageFolder
from sdlora.data.dataset import load_dataset
from sdlora.models.base import BaseModel

SHAPE = (8, 64, 64)
TURNS = 5
BATCH = 16
MOST_OWN = 1000


def measure(folder: Path, count: int) -> dict[str, float]:
    """Microseconds per sample, the median of some turns through the whole set."""
    make_set(folder / "set", count)
    stub = SimpleNamespace(
        vae_identity="vae", text_identity="text", encode_pixels=lambda _: torch.randn(1, *SHAPE), encode_captions=None
    )
    cache = Cache(folder / "cache", cast(BaseModel, stub))
    data = load_dataset(ImageFolder(str(folder / "set")))
    examples = data.with_buckets(32, BucketOptions(8)).examples
    for _ in cache.fill_moments(examples, "white"):
        pass
    files = list((folder / "cache").rglob("*.safetensors"))
    own = [torch.randn(SHAPE).half() for _ in range(min(count, MOST_OWN))]
    return {
        "own memory": microseconds(torch.stack, own),
        "mapped": microseconds(cache.moments, examples),
        "opened each time": microseconds(
            lambda some: torch.stack([load_file(file)["moments"] for file in some]), files
        ),
    }


def microseconds(read: Callable[[list[Any]], Tensor], places: Sequence[Any]) -> float:
    """Of one sample, its copy into a batch included."""
    found = []
    for turn in range(TURNS):
        order = list(places)
        random.Random(turn).shuffle(order)
        start = time.process_time()
        for first in range(0, len(order), BATCH):
            read(order[first : first + BATCH])
        found.append(1e6 * (time.process_time() - start) / len(order))
    return statistics.median(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[500, 10_000])
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found: dict[int, dict[str, float]] = {}
    for count in options.sizes:
        with tempfile.TemporaryDirectory() as folder:
            found[count] = measure(Path(folder), count)
        told = ", ".join(f"{name} {value:.1f} us" for name, value in found[count].items())
        if not options.json:
            print(f"{count} images: {told}", flush=True)
    if options.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
