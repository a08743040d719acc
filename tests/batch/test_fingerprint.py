"""A fingerprint follows what the result follows from, and nothing else."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from sdlora.batch import fingerprint
from sdlora.batch.fingerprint import Fingerprints
from sdlora.configfile import parse_config


def of(folder: Path, overrides: Sequence[str] = ()) -> str:
    return Fingerprints().of(parse_config({"data": {"folder": str(folder)}}, name="x", overrides=overrides))


def test_settings_pictures_captions_and_version_count(
    tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = tmp_path / "mine"
    shutil.copytree(pictures, mine)
    before = of(mine)
    assert of(mine) == before
    assert of(mine, ["lora.rank=3"]) != before
    assert of(mine, ["cache.dir=elsewhere", "train.log_every_steps=3"]) == before
    (mine / "notes.md").write_text("no part of the set")
    assert of(mine) == before
    (mine / "red.txt").write_text("a red ball!")
    changed = of(mine)
    assert changed != before
    (mine / "red.png").write_bytes((mine / "blue.png").read_bytes())
    assert of(mine) not in (before, changed)
    shutil.rmtree(mine)
    assert of(mine) not in (before, changed)
    shutil.copytree(pictures, mine)
    assert of(mine) == before
    monkeypatch.setattr(fingerprint, "__version__", "0.0.0")
    assert of(mine) != before


def test_held_out_pictures_count(tmp_path: Path, pictures: Path, others: Path) -> None:
    held = tmp_path / "held"
    shutil.copytree(others, held)
    before = of(pictures, [f"data.holdout={held}"])
    (held / "pink.txt").write_text("another")
    assert of(pictures, [f"data.holdout={held}"]) != before
