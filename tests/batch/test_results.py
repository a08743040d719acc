"""Figures of a batch: which settings differ, which jobs no other one beats, and what the tables hold."""

from __future__ import annotations

import csv
import json
import random
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.batch_runs import config, runs_in, write_run
from helpers.checks import CLEAN, COPY, NOVEL, image, signal

from sdlora.batch.jobs import Job
from sdlora.batch.location import Ledger, Record
from sdlora.batch.results import collect, comparable, differing, pareto_front, write_page, write_tables
from sdlora.config.toml import parse_config

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


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


def write(jobs: list[Job], ledger: Ledger) -> None:
    runs = runs_in(ledger.folder)
    write_page(ledger.folder / "report.html", ledger.folder.name, collect(jobs, ledger, runs), runs)


@pytest.fixture
def batch(tmp_path: Path) -> Path:
    """Three finished jobs of ranks 4, 16 and 8, and one that failed."""
    ledger, jobs = Ledger(tmp_path / "my batch"), []
    for rank, loss, like in ((4, 0.5, 0.2), (16, 0.3, 0.6), (8, 0.6, 0.3)):
        name = f"zumi-rank{rank}"
        jobs.append(Job(name, 0, {"lora.rank": rank}, config(rank=rank)))
        previews = [replace(one, hp_ms=like, significant=rank == 16) for one in (CLEAN, NOVEL)]
        write_run(ledger.folder / name, loss, *previews)
        drawn = ledger.folder / name / "epochs" / "2" / "previews"
        drawn.mkdir()
        for preview in previews:
            image("red").save(drawn / Path(preview.file).name)
        ledger.put(name, Record("done", "x", epoch=2, seconds=90.0, peak_memory_bytes=2**30))
    jobs.append(Job("wrong", 0, {}, None, "no"))
    ledger.put("wrong", Record(fault="lora.rank: <999>"))
    write(jobs, ledger)
    return ledger.folder


def test_page_has_every_job_and_its_error(batch: Path) -> None:
    page = (batch / "report.html").read_text(encoding="utf-8")
    assert "3 of 4 jobs are done" in page
    assert "Look first at 2, zumi-rank16" in page
    assert "lora.rank: &lt;999&gt;" in page and "<999>" not in page
    assert "<b>friends</b>" not in page
    assert page.count('class="front"') == 2
    assert "<svg" in page and "validation loss by similarity to training images" in page
    # Two prompts of one seed, by three jobs; the images are equal, but they are of different files.
    assert len(re.findall(r'<a class="tile[^>]*href="zumi-rank\d+/report.html">', page)) == 6
    assert page.count("tile copying") == 1 and page.count("tile watch") == 1


def test_jobs_with_other_prompts_get_a_separate_grid(batch: Path) -> None:
    check = batch / "zumi-rank4" / "epochs" / "2" / "copycheck.json"
    values = json.loads(check.read_text())
    values["previews"][0]["prompt"] = "something else"
    check.write_text(json.dumps(values))
    ledger = Ledger.read(batch)
    jobs = [Job(name, 0, {}, None if name == "wrong" else config()) for name in ledger.records]
    write(jobs, ledger)
    assert (batch / "report.html").read_text(encoding="utf-8").count('class="grid"') == 2


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
def test_headings_sort_in_a_browser_and_page_fits_a_phone(batch: Path) -> None:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 390, "height": 800})
        faults: list[str] = []
        page.on("console", lambda message: faults.append(message.text))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.goto((batch / "report.html").as_uri())
        numbers = page.locator("table.jobs tbody td:first-child")
        button = page.locator("th button", has_text="rank")
        button.click()
        up = numbers.all_inner_texts()
        button.click()
        down = numbers.all_inner_texts()
        width = page.evaluate("document.documentElement.scrollWidth")
        browser.close()
    # By number, not as text, and what has no value comes last both times.
    assert (up, down) == (["1", "3", "2", "4"], ["2", "3", "1", "4"])
    assert (faults, width) == ([], 390)
