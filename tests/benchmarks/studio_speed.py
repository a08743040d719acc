"""How long the studio's pages take with 300 images and 60 runs, as docs/studio.md states it.

    python tests/benchmarks/studio_speed.py

needs the `dev` extra and Chromium. Images and runs are made in a temporary folder; nothing is trained.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import sync_playwright

sys.path.insert(0, str(Path(__file__).parents[1]))

from helpers.browsing import CHROMIUM, Open, browser_page, open_studio, tab
from helpers.checks import CLEAN, check, write_epochs
from helpers.metrics import epoch, step, write_metrics
from helpers.studios import write_state

from sdlora.config.toml import parse_config
from sdlora.ui.settings.draft import Draft, write_draft
from sdlora.ui.state.folders import Studio

NUM_IMAGES, NUM_RUNS, SIZE_PX, SETTLE_SECONDS, REST_SECONDS = 300, 60, 768, 5, 20


def fill(studio: Studio) -> None:
    """A set of JPEGs with captions, and runs with previews and copy checks of three epochs."""
    studio.create()
    folder = studio.image_set("many")
    folder.mkdir(parents=True)
    noise = Image.effect_noise((SIZE_PX, SIZE_PX), 90).convert("RGB")
    for number in range(NUM_IMAGES):
        shade = Image.new("RGB", noise.size, (number % 256, 255 - number % 256, 7 * number % 256))
        Image.blend(noise.rotate(number), shade, 0.5).save(folder / f"p{number:03}.jpg", quality=90)
        (folder / f"p{number:03}.txt").write_text(f"zumi, number {number}, rain", encoding="utf-8")
    for number in range(NUM_RUNS):
        config = parse_config({"data": {"folder": str(folder)}}, name=f"run {number:02}")
        run = write_state(studio, config, status="done")
        write_epochs(run / "epochs", {e: check("clean", *[CLEAN] * 4) for e in range(4)})
        events = [epoch(e, step=100 * e, train_loss=0.4, validation_loss=0.3) for e in range(4)]
        steps = [step(s, ["p000.jpg"], [s], epoch=s // 101 + 1) for s in range(1, 301)]
        write_metrics(run / "metrics.jsonl", [*events, *steps])
        for made in range(1, 4):
            (run / "epochs" / str(made) / "adapter.safetensors").write_bytes(b"x")
            (run / "epochs" / str(made) / "proof.json").write_text("{}", encoding="utf-8")
    write_draft(studio, Draft(images="many").with_values({"data.trigger": "zumi"}))


def timed(action: Callable[[], object]) -> float:
    """Milliseconds of an action until its answer is on the page."""
    began = time.perf_counter()
    action()
    return 1000 * (time.perf_counter() - began)


def actions(page: Any) -> dict[str, Callable[[], object]]:
    """What an artist does, each until its answer is shown."""
    caption = page.get_by_label("Caption of p000.jpg")

    def save() -> None:
        caption.fill(f"zumi, {time.time()}")
        caption.blur()
        page.locator("[data-image='p000.jpg'] .saved", has_text="Saved").wait_for()

    def show(words: str, number: int) -> None:
        page.locator("#cards-only input").fill(words)
        page.locator("#cards-only input").press("Enter")
        page.wait_for_function(f"document.querySelectorAll('#cards .card').length === {number}")

    def choose_run(name: str) -> None:
        page.locator("#run input").fill(name)
        page.locator("#run input").press("Enter")
        page.locator("#status h2", has_text=name).wait_for(state="attached")

    def go(name: str, shown: str) -> None:
        tab(page, name)
        page.locator(shown).first.wait_for()

    return {
        "save a caption": save,
        "show the images with a word": lambda: show("9, rain", 30),
        "show all images": lambda: show("all", 48),
        "go to the recipe": lambda: go("Recipe", "#plan .plan"),
        "change the length": lambda: (page.locator("#length label", has_text="first look").click(),
                                      page.locator("#plan", has_text="2 epochs").wait_for()),
        "go to the training": lambda: go("Training", "#status h2"),
        "choose a run": lambda: choose_run("run 30"),
        "go to the result": lambda: go("Result", "#result .verdict"),
        "go to all runs": lambda: go("Runs", "#run-cards article"),
    }  # fmt: skip


def at_rest(page: Any) -> float:
    """Bytes a second that a tab sends and receives while nothing is done, headers included."""
    session = page.context.new_cdp_session(page)
    session.send("Network.enable")
    moved: list[int] = []

    def headers(event: Any) -> int:
        return sum(len(name) + len(str(value)) + 4 for name, value in event["headers"].items())

    def sent(event: Any) -> None:
        request = event["request"]
        moved.append(len(f"{request['method']} {request['url']} HTTP/1.1") + len(request.get("postData", "")))

    session.on("Network.requestWillBeSent", sent)
    session.on("Network.requestWillBeSentExtraInfo", lambda event: moved.append(headers(event)))
    session.on("Network.responseReceivedExtraInfo", lambda event: moved.append(headers(event) + 20))
    session.on("Network.dataReceived", lambda event: moved.append(event["encodedDataLength"]))
    page.wait_for_timeout(1000 * SETTLE_SECONDS)  # images of the last page may still be on their way
    moved.clear()
    page.wait_for_timeout(1000 * REST_SECONDS)
    return sum(moved) / REST_SECONDS


def main() -> None:
    """Print the figures."""
    with tempfile.TemporaryDirectory() as scratch, sync_playwright() as playwright:
        studio = Studio(Path(scratch) / "runs")
        fill(studio)
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        began = time.perf_counter()
        with open_studio(studio.runs) as opened:
            print(f"{time.perf_counter() - began:6.1f} s from the command to the first answer, imports included")
            measure(browser, opened)
        browser.close()


def measure(browser: Any, opened: Open) -> None:
    """Open the studio for the first and the second time, and act."""
    for which in ("first", "second"):
        began = time.perf_counter()
        with browser_page(browser, opened) as page:
            page.locator("#cards .card").nth(47).wait_for()
            print(f"{time.perf_counter() - began:6.1f} s until the page is usable, opened for the {which} time")
            if which == "second":
                for name, action in actions(page).items():
                    print(f"{timed(action):6.0f} ms to {name}")
                print(f"{at_rest(page):6.0f} bytes a second at rest")
    print(f"load of the machine: {', '.join(f'{load:.1f}' for load in os.getloadavg())}, {os.cpu_count()} cores")


if __name__ == "__main__":
    main()
