"""The estimate of a run's room is above what it takes, and not by orders of magnitude."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from sdlora.config.toml import load_config
from sdlora.errors import DiskFullError
from sdlora.run.disk_space import cache_bytes, check_room, run_bytes
from sdlora.run.folder import RunFolder
from sdlora.run.run import start
from sdlora.run.setup import prepare

Usage = namedtuple("Usage", "total used free")


def taken(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def test_the_estimate_is_above_what_is_taken(
    tmp_path: Path, overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "hero.toml"
    source.write_text("lora.target_ranks = { cross_attention = 64 }", encoding="utf-8")
    config = load_config(str(source), overrides)
    folder = RunFolder(tmp_path / "run", "hero")
    parts = prepare(config, folder)
    check_room(parts, resume=False)
    needed, cached = run_bytes(parts), cache_bytes(parts)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, needed // 2))
    with pytest.raises(DiskFullError, match="left, and the run needs up to"):
        check_room(parts, resume=False)
    monkeypatch.undo()
    list(start(config, folder.path))
    assert taken(folder.path) < needed + 2_000_000 and needed < 20 * taken(folder.path)
    assert taken(tmp_path / "cache") < cached + 2_000_000


def test_cache_estimate_counts_the_repeats_of_each_set(
    tmp_path: Path, overrides: list[str], images: Path, others: Path
) -> None:
    source = tmp_path / "mine.toml"
    source.write_text("", encoding="utf-8")

    def estimated(first: int, second: int) -> int:
        sets = f'data.sets=[{{folder="{images}", repeats={first}}}, {{folder="{others}", repeats={second}}}]'
        config = load_config(str(source), [*overrides, "data.folder=", sets, "data.shuffle_tags=true"])
        return cache_bytes(prepare(config, RunFolder(tmp_path / "run", "mine")))

    one, more = estimated(1, 1), estimated(4, 1)
    assert one < more < estimated(4, 4)
