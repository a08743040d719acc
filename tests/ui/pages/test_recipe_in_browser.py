"""The page of the recipe in a browser: changes in a row, a start at once, a search; left out without Chromium."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.browsing import CHROMIUM, Open, browser_page, open_studio, tab
from helpers.studios import write_image

from sdlora.config.toml import load_config
from sdlora.ui.settings.draft import Draft, write_draft
from sdlora.ui.state.folders import Studio

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = [pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium"), pytest.mark.slow]


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Open]:
    studio = Studio(tmp_path_factory.mktemp("recipe") / "runs")
    studio.create()
    for number in range(4):
        image = write_image(studio.image_set("set") / f"{number}.png", (number, 90, 200), (300, 200 + number))
        image.with_suffix(".txt").write_text(f"zumi number {number}", encoding="utf-8")
    write_draft(studio, Draft(images="set"))
    with open_studio(studio.runs) as found:
        yield found


@pytest.fixture
def page(opened: Open) -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        with browser_page(browser, opened) as found:
            tab(found, "Recipe")
            found.locator("#plan .plan").wait_for()
            yield found
        browser.close()


def test_settings_are_searched_typed_with_a_comma_and_marked(page: Any, opened: Open) -> None:
    page.click("#more > button")
    page.locator("#search-settings textarea, #search-settings input").click()
    page.locator("#set-train-learning_rate").wait_for()
    page.keyboard.type("peak learning")
    page.locator("#set-seed").wait_for(state="hidden")
    rate = page.locator("#set-train-learning_rate textarea, #set-train-learning_rate input")
    rate.fill("0,0005")
    rate.press("Tab")
    page.locator("#recipe-changes", has_text="0.0005").wait_for()
    mark = "getComputedStyle(document.querySelector('#set-train-learning_rate'), '::before').content"
    assert page.evaluate(mark) == '"changed"'
    assert json.loads((opened.runs / ".studio" / "draft.json").read_text())["values"]["train.learning_rate"] == 5e-4


def test_a_base_that_cannot_be_is_told_beside_its_field(page: Any) -> None:
    page.locator("#base input").fill("<b>x</b>")
    page.locator("#base input").press("Tab")
    page.locator("#base-note", has_text="There is no base model '<b>x</b>'").wait_for()
    assert page.locator("#start").is_disabled()
    page.locator("#base input").fill("pocket")
    page.locator("#base input").press("Tab")
    page.locator("#start:enabled").wait_for()


def test_a_start_right_after_changes_takes_them_all(page: Any, opened: Open) -> None:
    tab(page, "Images")
    page.locator("#trigger textarea, #trigger input").fill("mizu")
    tab(page, "Recipe")
    page.locator("#length label", has_text="a first look").click()
    page.locator("#subject label", has_text="style").click()
    page.click("#start")
    page.locator("#status h2", has_text="set").wait_for()
    for worker in opened.workers():
        worker.kill()
    config = load_config(str(opened.runs / ".studio" / "jobs" / "set.toml"))
    assert (config.data.triggers, config.train.epochs, config.data.repeats_range) == (["mizu"], 2, (12, 12))
    assert Path(config.data.folders[0]).name == "set"
