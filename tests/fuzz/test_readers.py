"""Whatever a file holds, its reader ends in a result or in one of our errors, soon and in bounded memory.

A slice of the inputs is read by default; all of them, with their memory, with `--slow`.
"""

from __future__ import annotations

import json
import random
import re
import resource
import shutil
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from helpers.commandline import CommandLine
from helpers.ldm import authors_layout
from helpers.mutation import KINDS, content_of
from helpers.tiny import tiny_networks

from sdlora.batch.jobs import read_jobs
from sdlora.config.imports.detect import import_file
from sdlora.config.toml import load_config
from sdlora.data.captions import caption_in, read_metadata
from sdlora.data.images import load_image, load_mask
from sdlora.errors import BaseModelError, DataError, SdloraError
from sdlora.lora_files.read import describe_lora, read_file
from sdlora.models.architectures import Header, identify, read_header
from sdlora.models.single_file import check_weights
from sdlora.ui.state.uploads import store_upload

MOST_SECONDS, MOST_MB = 5.0, 300
FEW, ALL = 150, 2000


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


@cache
def _shapes() -> dict[str, tuple[int, ...]]:
    """Those of a whole checkpoint, small."""
    return {key: tuple(tensor.shape) for key, tensor in authors_layout("sd1", tiny_networks("sd1")).items()}


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


def check(folder: Path, least: int) -> None:
    report = json.loads((folder / "report.json").read_text())
    assert not report["faults"], "\n".join(report["faults"][:20])
    # Inputs that are all refused at once, or none of them, would test nothing.
    assert min(report["read"], report["refused"]) >= least


@pytest.mark.parametrize("kind", KINDS)
def test_some_changed_files_are_read_or_refused(kind: str, tmp_path: Path) -> None:
    read_all(kind, FEW, tmp_path)
    check(tmp_path, 1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_changed_files_are_read_or_refused_soon_and_in_bounded_memory(
    kind: str, command: CommandLine, tmp_path: Path
) -> None:
    outcome = command.call(read_all, kind, ALL, tmp_path)
    assert outcome.code == 0, outcome.err
    check(tmp_path, ALL // 40)


@pytest.mark.parametrize("count", [5, pytest.param(200, marks=pytest.mark.slow)])
def test_checkpoints_of_changed_shapes_are_refused_in_words(count: int, small: None) -> None:
    """Read as far as the networks that they make, which takes longer than other headers."""
    check_weights(_header(_shapes()), identify(_header(_shapes()), "x").architecture, "x")
    refused = 0
    for number in range(count):
        rng, shapes = random.Random(number), dict(_shapes())
        for key in rng.sample(list(shapes), rng.randrange(1, 4)):
            size = rng.choice([0, 1, 3, 64, 2**40])
            match rng.randrange(5):
                case 0:
                    del shapes[key]
                case 1:
                    shapes[key] = shapes[key][:-1]
                case 2:
                    shapes[key] = (size, *shapes[key][1:])
                case 3:
                    shapes[key] = (*shapes[key], size)
                case _:
                    shapes[re.sub(r"\d+", str(rng.choice([0, 1, 7, 10**6])), key, count=1)] = shapes.pop(key)
        try:
            check_weights(_header(shapes), identify(_header(shapes), "x").architecture, "x")
        except BaseModelError as error:
            assert str(error)
            refused += 1
    assert refused > count // 2


def _header(shapes: dict[str, tuple[int, ...]]) -> Header:
    return Header(shapes, {}, dict.fromkeys(shapes, "F16"), dict.fromkeys(shapes, 0))
