"""The page of a batch: every job, the front, previews side by side, nothing unescaped."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.batch_runs import config, runs_in, write_run
from helpers.checks import CLEAN, NOVEL, image

from sdlora.batch.jobs import Job
from sdlora.batch.location import Ledger, Record
from sdlora.batch.page import write_page
from sdlora.batch.results import collect

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


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
