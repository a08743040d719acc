"""`sdlora cache`: everything that a run encodes, by several processes, and nothing twice."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from sdlora.config.schema import RunConfig
from sdlora.config.toml import parse_config
from sdlora.events import Progress
from sdlora.models.base import TextEmbeddings
from sdlora.models.sd import StableDiffusion
from sdlora.run.fill_cache import fill_cache
from sdlora.run.run import start


def settings(overrides: Sequence[str], others: Path, *changes: str) -> RunConfig:
    more = [
        f"data.validation_folder={others}",
        "data.caption_dropout=0.5",
        "data.repeats=3",
        "data.trigger=zumi",
        *changes,
    ]
    return parse_config({"data": {"folder": "x"}}, name="x", overrides=[*overrides, "preview.enabled=false", *more])


def files(config: RunConfig) -> dict[str, int]:
    assert config.cache.dir is not None
    found = Path(config.cache.dir).rglob("*.safetensors")
    return {f"{file.parent.parent.name}/{file.name}": file.stat().st_mtime_ns for file in found}


def test_run_after_filling_encodes_nothing(
    overrides: list[str], others: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(overrides, others)
    progress = [event for event in fill_cache(config, 1) if isinstance(event, Progress)]
    # 5 images and 3 validation ones, their captions, and the empty one.
    assert (progress[-1].done, progress[-1].total) == (17, 17)
    made = files(config)
    assert len(made) == 17
    real = StableDiffusion.encode_captions

    def only_the_empty_one(base: StableDiffusion, captions: Sequence[str]) -> TextEmbeddings:
        assert list(captions) == [""], "a run encodes that one to see how large they are"
        return real(base, captions)

    # What a run does not find, it would encode.
    monkeypatch.setattr(StableDiffusion, "encode_pixels", None)
    monkeypatch.setattr(StableDiffusion, "encode_captions", only_the_empty_one)
    for _ in start(config, tmp_path / "run"):
        pass
    assert files(config) == made


def test_captions_that_vary_are_all_known(
    overrides: list[str], images: Path, others: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "varied"
    shutil.copytree(images, folder)
    (folder / "red.txt").write_text("a {red|crimson} ball, one ||| two, three\na ball, four, five, six")
    config = settings(
        overrides, others, f"data.folder={folder}", "data.tag_dropout=0.5", "data.keep_separator=|||",
        "data.wildcards=true", "data.caption_lines=true", "data.caption_prefix=best,", "data.shuffle_tags=true",
        "data.flip=true",
    )  # fmt: skip
    for _ in fill_cache(config, 1):
        pass
    made = files(config)
    monkeypatch.setattr(StableDiffusion, "encode_pixels", None)
    for _ in start(config, tmp_path / "run"):
        pass
    assert files(config) == made
    assert sum(name.startswith("text/") for name in made) > 9
    # 5 images and their mirror images, and 3 validation images.
    assert sum(name.startswith("moments/") for name in made) == 13


def test_several_processes_fill_the_same_cache_and_resume(overrides: list[str], others: Path, tmp_path: Path) -> None:
    alone = settings(overrides, others)
    shared = settings(overrides, others, f"cache.dir={tmp_path / 'shared'}")
    for _ in fill_cache(alone, 1):
        pass
    made = files(alone)
    *_, last = fill_cache(shared, 2)
    assert isinstance(last, Progress) and (last.done, last.total) == (17, 17)
    assert files(shared).keys() == made.keys()
    lost = next(Path(str(shared.cache.dir)).rglob("*.safetensors"))
    kept = files(shared)
    lost.unlink()
    for _ in fill_cache(shared, 1):
        pass
    again = files(shared)
    assert again.keys() == kept.keys()
    assert sum(again[name] != kept[name] for name in kept) == 1


def test_entries_not_kept_in_memory_are_read_again(
    overrides: list[str], others: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(overrides, others)
    weights = []
    for name, most in (("all", 100), ("none", 0)):
        monkeypatch.setattr("sdlora.cache.tensors.MOST_MAPPED", most)
        for _ in start(config, tmp_path / name):
            pass
        content = (tmp_path / name / "x.safetensors").read_bytes()
        weights.append(content[8 + int.from_bytes(content[:8], "little") :])
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_benchmark_of_large_sets_runs() -> None:
    program = Path(__file__).parents[1] / "benchmarks" / "large_sets.py"
    command = [sys.executable, str(program), "--sizes", "60", "120", "--json"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [row["pictures"] for row in rows] == [60, 120]
    for row in rows:
        assert row["warm_cache_seconds"] < row["cold_cache_seconds"]
        assert row["epoch_start_seconds"] < 2.0
