"""The page as a browser shows it; left out where there is no Chromium."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from helpers.checks import CLEAN, COPY, GALLERY, check, signal, write_epochs
from helpers.metrics import epoch, write_metrics
from PIL import Image

from sdlora.report.report import write_report

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
LONG = "zumi far away on a long winter evening " * 5 + "in" + "credibly" * 20
WIDTHS = (390, 1366)


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    previews = [CLEAN, COPY, replace(CLEAN, prompt=LONG, seed=1, nearest="b.png", file="previews/p2.png")]
    checks = {epoch: check("copying", *previews, seed_collapse=signal(0.1, 0.2)) for epoch in range(6)}
    write_epochs(folder / "epochs", checks)
    losses = {"train_loss": 0.4, "validation_loss": 0.3}
    bands = {"train_bands": [0.1] * 5, "validation_bands": [0.1] * 5, "validation_change": [0.0] * 5}
    write_metrics(folder / "metrics.jsonl", [epoch(number, **losses, **bands) for number in checks])
    (folder / "config.toml").write_text("[data]")
    write_report(folder, "run", ["Kept. " * 40], GALLERY)
    shutil.rmtree(folder / "epochs")
    return folder / "report.html"


@pytest.fixture(params=WIDTHS)
def page(browser: Any, page_file: Path, request: pytest.FixtureRequest) -> Iterator[Any]:
    faults: list[str] = []
    opened = browser.new_page(viewport={"width": request.param, "height": 844}, has_touch=True)
    opened.on("console", lambda message: faults.append(message.text))
    opened.on("pageerror", lambda error: faults.append(str(error)))
    opened.on("request", lambda sent: faults.append(sent.url) if not sent.url.startswith("data:") else None)
    opened.goto(page_file.as_uri())
    yield opened
    opened.close()
    assert faults == [page_file.as_uri()], "the page asked for something, or complained"


def test_page_is_as_wide_as_the_window(page: Any) -> None:
    assert page.evaluate("document.documentElement.scrollWidth") == page.viewport_size["width"]
    grid = page.locator(".wide:has(.grid)").first
    scrolls = grid.evaluate("box => box.scrollWidth > box.clientWidth")
    assert scrolls == (page.viewport_size["width"] == 390)


def test_prompts_stay_in_sight_when_the_grid_is_scrolled(page: Any) -> None:
    page.locator(".wide:has(.grid)").first.evaluate("box => { box.scrollLeft = 9999 }")
    for box in (page.locator(".prompt").nth(index).bounding_box() for index in range(2)):
        assert box["x"] >= 0 and box["x"] + box["width"] <= page.viewport_size["width"]
        assert box["width"] >= 100


def test_every_image_loads(page: Any) -> None:
    page.locator("details").evaluate_all("all => all.forEach(one => { one.open = true })")
    page.wait_for_function("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    assert page.locator("img").count() == 3 * 6 * 4


def test_slider_reveals_the_training_image(page: Any) -> None:
    pair = page.locator(".pair").first
    slider, wipe = pair.locator("input[type=range]"), pair.locator(".wipe")
    wipe.scroll_into_view_if_needed()
    yellow, blue = (255, 255, 0), (0, 0, 255)
    assert (pixel(wipe, 0.25, 0.8), pixel(wipe, 0.75, 0.8)) == (yellow, yellow)
    slider.focus()
    for _ in range(50):
        page.keyboard.press("ArrowRight")
    assert slider.input_value() == "50"
    assert (pixel(wipe, 0.25, 0.8), pixel(wipe, 0.75, 0.8)) == (blue, yellow)
    box = slider.bounding_box()
    page.touchscreen.tap(box["x"] + box["width"] - 3, box["y"] + box["height"] / 2)
    assert (pixel(wipe, 0.25, 0.8), pixel(wipe, 0.75, 0.8)) == (blue, blue)


def test_training_image_can_be_mirrored(page: Any) -> None:
    pair = page.locator(".pair").first
    beside = pair.locator(".two > .training img")
    assert pixel(beside, 0.2, 0.2) == (0, 0, 0)
    pair.locator("input[type=checkbox]").check()
    assert (pixel(beside, 0.2, 0.2), pixel(beside, 0.8, 0.2)) == ((0, 0, 255), (0, 0, 0))


def test_tile_opens_its_comparison(page: Any) -> None:
    page.locator(".tile").first.click()
    assert page.locator("#pair-0-0").is_visible()
    page.wait_for_function("document.querySelector('#pair-0-0').getBoundingClientRect().top < innerHeight")


def pixel(locator: Any, x: float, y: float) -> tuple[int, ...]:
    shot = Image.open(BytesIO(locator.screenshot())).convert("RGB")
    found = shot.getpixel((int(x * shot.width), int(y * shot.height)))
    assert isinstance(found, tuple)
    return tuple(int(value) for value in found)
