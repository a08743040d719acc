"""Reads changed files of every kind in a process, and tells what became of them."""

from __future__ import annotations

import json
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from helpers.mutation import content_of

from sdlora.batch.jobs import read_jobs
from sdlora.config.imports.detect import import_file
from sdlora.config.toml import load_config
from sdlora.data.captions import caption_in, read_metadata
from sdlora.data.images import load_image, load_mask
from sdlora.errors import DataError, SdloraError
from sdlora.lora_files.read import describe_lora, read_file
from sdlora.models.architectures import identify, read_header
from sdlora.models.single_file import check_weights
from sdlora.ui.state.uploads import store_upload

MOST_SECONDS, MOST_MB = 5.0, 300


def _checkpoint(file: Path) -> None:
    header = read_header(file)
    check_weights(header, identify(header, "x").architecture, "x")


def _list(file: Path) -> None:
    _, faults = read_metadata(file)
    if faults:
        raise DataError(faults[0])


def _upload(file: Path) -> None:
    folder = file.with_name("set")
    store_upload([("x.zip", file)], folder)
    outside = [path for path in folder.parent.rglob("*") if path.parent != folder.parent and folder not in path.parents]
    assert not outside, "nothing is written beside the set"


READERS: dict[str, list[Callable[[Path], object]]] = {
    "text": [lambda file: caption_in(file, "x.txt"), lambda file: caption_in(file, "x.json")],
    "jsonl": [_list],
    "settings": [lambda file: load_config(str(file)), read_jobs, import_file],
    "safetensors": [describe_lora, lambda file: read_file(file, "rank"), _checkpoint],
    "zip": [_upload],
    "image": [lambda file: load_image(file, "white"), lambda file: load_mask(file, file)],
}


def read_all(kind: str, count: int, folder: Path) -> None:
    """Read the inputs of a kind, and write into the folder how many were read and refused, and what else became."""
    read = refused = 0
    faults = []
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(count):
        file = folder / f"x-{number}"
        file.write_bytes(content_of(kind, number))
        for place, reader in enumerate(READERS[kind]):
            begin = time.monotonic()
            try:
                reader(file)
                read += 1
            except SdloraError as error:
                refused += 1
                if not str(error):
                    faults.append(f"{kind} {number}, reader {place}: refused without a word")
            except Exception as error:  # a fault of ours, which the test is to name
                faults.append(f"{kind} {number}, reader {place}: {type(error).__name__}: {error}"[:300])
            if (seconds := time.monotonic() - begin) > MOST_SECONDS:
                faults.append(f"{kind} {number}, reader {place}: {seconds:.1f} s")
        file.unlink()
        shutil.rmtree(folder / "set", ignore_errors=True)
        now = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if (rise := (now - before) // 1024) > MOST_MB:
            faults.append(f"{kind} {number}: memory rose by {rise} MB")
            before = now
    (folder / "report.json").write_text(json.dumps({"read": read, "refused": refused, "faults": faults}))
