"""Whatever a file holds, its reader ends in a result or in one of our errors, soon and in bounded memory.

A slice of the inputs is read by default; all of them, with their memory, with `--slow`.
"""

from __future__ import annotations

import json
import random
import re
from functools import cache
from pathlib import Path

import pytest
from helpers.changed_files import read_all
from helpers.commandline import CommandLine
from helpers.ldm import authors_layout
from helpers.mutation import KINDS
from helpers.tiny import tiny_networks

from sdlora.errors import BaseModelError
from sdlora.models.architectures import Header, identify
from sdlora.models.single_file import check_weights

FEW, ALL = 150, 2000


@cache
def _shapes() -> dict[str, tuple[int, ...]]:
    """Those of a whole checkpoint, small."""
    return {key: tuple(tensor.shape) for key, tensor in authors_layout("sd1", tiny_networks("sd1")).items()}


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
