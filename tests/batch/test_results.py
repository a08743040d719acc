"""Figures of a batch: which settings differ, which jobs no other one beats, and what the tables hold."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path
from typing import Any

import pytest
from helpers.batch_runs import config, runs_in, write_run
from helpers.checks import CLEAN, COPY, signal

from sdlora.batch.jobs import Job
from sdlora.batch.location import Ledger, Record
from sdlora.batch.results import collect, comparable, differing, pareto_front, write_tables
from sdlora.config.toml import parse_config


def test_only_differing_settings_are_listed() -> None:
    assert differing([config(rank=4), config(rank=8), config(rank=4)]) == ["lora.rank"]
    assert differing([config(rank=4)]) == differing([]) == []


@pytest.mark.parametrize("seed", range(5))
def test_pareto_front_equals_a_search_of_all_pairs(seed: int) -> None:
    draw = random.Random(seed)
    points = [(draw.randrange(6) / 5, draw.randrange(6) / 5) for _ in range(25)]
    for point, on in zip(points, pareto_front(points), strict=True):
        beaten = [p for p in points if (p[0] < point[0] and p[1] >= point[1]) or (p[0] <= point[0] and p[1] > point[1])]
        assert on == (not beaten)


def test_results_come_from_the_kept_epoch(tmp_path: Path) -> None:
    losses = {"a": 0.5, "b": 0.4, "c": 0.6}
    jobs = [Job(name, 0, {}, config(rank=rank)) for rank, name in enumerate(losses, start=4)]
    jobs.append(Job("wrong", 0, {}, None, "lora.rank: no"))
    ledger = Ledger(tmp_path)
    for name, loss in losses.items():
        write_run(tmp_path / name, loss, COPY if name == "b" else CLEAN)
        ledger.put(name, Record("done", "x", epoch=2, seconds=12.0, peak_memory_bytes=2**30))
    ledger.put("wrong", Record(fault="lora.rank: no"))
    results = collect(jobs, ledger, runs_in(tmp_path))
    assert [result.validation_loss for result in results] == [0.5, 0.4, 0.6, None]
    assert [result.settings for result in results] == [{"lora.rank": r} for r in (4, 5, 6)] + [{"lora.rank": None}]
    assert results[1].copying is not None and results[0].copying is not None
    assert results[1].copying > results[0].copying
    # c copies as little as a and has learned less.
    assert [result.pareto for result in results] == [True, True, False, False]
    assert [[one.job for one in group] for group in comparable(results)] == [["a", "b", "c"]]
    write_tables(tmp_path, results)
    with (tmp_path / "results.csv").open(newline="") as handle:
        rows = list(csv.DictReader(handle))
    assert [row["job"] for row in rows] == ["a", "b", "c", "wrong"]
    assert rows[1]["lora.rank"] == "5" and float(rows[1]["heldout_loss"]) == 0.4
    assert rows[3]["error"] == "lora.rank: no" and rows[3]["verdict"] == ""
    assert json.loads((tmp_path / "results.json").read_text())[2]["pareto"] is False


@pytest.mark.parametrize(
    "data", [{"folder": "a"}, {"sets": [{"folder": "a"}, {"folder": "c"}]}], ids=["one folder", "several sets"]
)
def test_jobs_on_different_images_are_not_comparable(tmp_path: Path, data: dict[str, Any]) -> None:
    ledger = Ledger(tmp_path)
    jobs = []
    for name, images in (("a", data), ("b", {"sets": [{"folder": "b"}, {"folder": "c"}]})):
        jobs.append(Job(name, 0, {}, parse_config({"data": images}, name=name)))
        write_run(tmp_path / name, 0.5, CLEAN)
        ledger.put(name, Record("done", "x", epoch=2))
    assert comparable(collect(jobs, ledger, runs_in(tmp_path))) == []


def test_fidelity_counts_if_every_job_has_one(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    jobs = []
    for name, value, loss in (("a", 0.7, 0.9), ("b", 0.5, 0.1)):
        jobs.append(Job(name, 0, {}, config()))
        write_run(tmp_path / name, loss, CLEAN, concept_fidelity=signal(value, None))
        ledger.put(name, Record("done", "x", epoch=2))
    results = collect(jobs, ledger, runs_in(tmp_path))
    assert [result.fidelity for result in results] == [0.7, 0.5]
    assert [result.pareto for result in results] == [True, False]
