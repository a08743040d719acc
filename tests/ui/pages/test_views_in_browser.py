"""The pages as a browser shows them: readable, narrow, by few clicks; left out where there is no Chromium."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.browsing import CHROMIUM, Open, browser_page, open_studio, tab
from helpers.checks import CLEAN, COPY, check, signal, write_epochs
from helpers.hostile import CAPTIONS
from helpers.metrics import epoch, step, write_metrics
from helpers.studios import write_image, write_state

from sdlora.common.bundled import resolve_data_folder
from sdlora.config.toml import parse_config
from sdlora.ui.settings.draft import Draft, write_draft
from sdlora.ui.state.folders import Studio

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
TABS = ("Images", "Recipe", "Training", "Copy check", "Result", "Runs")


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Open]:
    """A studio with hostile captions, a run that copies and one that failed."""
    studio = Studio(tmp_path_factory.mktemp("filled") / "runs")
    studio.create()
    folder = studio.image_set("set")
    for number, caption in enumerate(CAPTIONS[:12]):
        path = write_image(folder / f"p{number:02d} <b onclick=x>.png", (number * 20, 90, 200), (300, 200 + number))
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    write_image(folder / "uncaptioned.png", "green")
    write_draft(studio, Draft(images="set").with_values({"data.trigger": "zumi"}))
    for name, status in (("copies", "done"), ("fails", "failed")):
        config = parse_config({"data": {"folder": str(folder)}}, name=name)
        run = write_state(studio, config, status=status, error="<b>The loss became NaN.</b> Lower it." * 3)
        (run / "log.txt").write_text("Traceback <script>window.hacked=1</script>\n" * 30, encoding="utf-8")
        previews = [CLEAN, COPY]
        write_epochs(run / "epochs", {e: check("copying" if e else "clean", *previews, seed_collapse=signal(0.1, 0.2))
                                      for e in range(4)})  # fmt: skip
        events = [epoch(e, step=9 * e, train_loss=0.4, validation_loss=0.3) for e in range(4)]
        steps = [step(s, ["p00.png", "p01.png"], [1, 999], epoch=s // 9 + 1) for s in range(1, 27)]
        write_metrics(run / "metrics.jsonl", [*events, *steps])
        for number in (1, 2, 3):
            (run / "epochs" / str(number) / "adapter.safetensors").write_bytes(b"x")
            (run / "epochs" / str(number) / "proof.json").write_text("{}", encoding="utf-8")
    with open_studio(studio.runs) as opened:
        yield opened


def settled(page: Any, name: str) -> None:
    """Go to a page and wait until its images are there."""
    tab(page, name)
    page.wait_for_function("[...document.images].every(one => one.complete || one.loading === 'lazy')")


@pytest.mark.slow
@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1366])
def test_every_page_can_be_read_by_everyone(browser: Any, filled: Open, width: int, theme: str) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is not installed").Axe()
    with browser_page(browser, filled, width=width, theme=theme) as page:
        page.locator("#cards .card").first.wait_for()
        assert page.evaluate("document.body.classList.contains('dark')") == (theme == "dark")
        found = []
        for name in TABS:
            settled(page, name)
            # An opened one is no longer among the closed ones, and may hold further ones.
            closed = page.locator("[role=tabpanel]:visible button.label-wrap:not(.open)")
            while closed.count() > 0:
                one = closed.first.element_handle()
                one.click()
                page.wait_for_function("one => one.classList.contains('open')", arg=one)
            assert page.evaluate("document.documentElement.scrollWidth") <= width, f"{name} scrolls sideways"
            for fault in axe.run(page).response["violations"]:
                if fault["impact"] in ("critical", "serious"):
                    nodes = [node["html"][:160] for node in fault["nodes"]][:3]
                    found.append(f"{name}: {fault['id']}: {len(fault['nodes'])}: {nodes}")
        assert not found, "\n".join(found)


def test_all_six_steps_are_in_sight_on_a_phone(browser: Any, filled: Open) -> None:
    with browser_page(browser, filled, width=390) as page:
        for name in TABS:
            box = page.get_by_role("tab", name=name, exact=True).bounding_box()
            assert box["x"] >= 0 and box["x"] + box["width"] <= 390


def test_steps_are_reached_by_keyboard(browser: Any, filled: Open) -> None:
    with browser_page(browser, filled) as page:
        page.get_by_role("tab", name="Recipe", exact=True).focus()
        page.keyboard.press("Enter")
        page.locator("#plan").wait_for()
        page.get_by_role("tab", name="Images", exact=True).focus()
        page.keyboard.press("Enter")
        page.locator("#trigger input, #trigger textarea").focus()
        page.keyboard.press("End")
        page.keyboard.type("x")
        assert page.locator("#trigger input, #trigger textarea").input_value() == "zumix"


def test_hostile_names_and_captions_are_words(browser: Any, filled: Open) -> None:
    with browser_page(browser, filled) as page:
        page.locator("#cards .card").first.wait_for()
        shown = page.locator("#cards textarea").evaluate_all("all => all.map(one => one.value)")
        for caption in CAPTIONS[:6]:
            assert caption in shown
        for name in TABS:
            settled(page, name)
        assert page.evaluate("window.hacked") is None
        assert page.locator(".sd script, .sd [onclick], .sd [onerror], .sd [onload]").count() == 0


def test_a_copying_epoch_is_told_with_its_images(browser: Any, filled: Open) -> None:
    with browser_page(browser, filled) as page:
        choose_run(page, "copies")
        page.locator("#grid .tile.copying").first.click()
        pair = page.locator(".pair.wanted")
        pair.wait_for()
        assert "Copies training images" in page.inner_text("#banner")
        slider = pair.locator("input[type=range]")
        slider.fill("60")
        assert pair.evaluate("one => one.style.getPropertyValue('--shown')") == "60%"
        choose_run(page, "fails")
        page.locator("#status", has_text="The run failed").wait_for()
        assert "Traceback" in page.inner_text("#status pre") and page.locator("#resume").is_visible()


def test_what_is_sent_for_is_told_in_words(browser: Any, filled: Open) -> None:
    with browser_page(browser, filled) as page:
        page.locator("#cards .card").first.wait_for()
        page.click("#model-captions > button")
        page.locator("#captioner input, #captioner textarea").fill("nobody/nothing")
        page.click("#ask-captions")
        page.locator("#caption-told", has_text="'nobody/nothing' could not be loaded").wait_for()
        page.click("#caption-end")
        page.locator("#caption-told .verdict").wait_for(state="detached")
        page.locator("#captions-as label", has_text="booru tags").click()
        page.locator("#captioner [placeholder*='tagger']").wait_for()
        choose_run(page, "copies")
        tab(page, "Result")
        page.click("#publishing > button")
        page.locator("#repo input, #repo textarea").fill("me/copies")
        page.click("#publish")
        page.locator("#publish-note", has_text="hf auth login").wait_for()
        assert not page.locator("#really-publish").is_visible()


@pytest.mark.slow
def test_a_large_set_stays_light(browser: Any, tmp_path: Path) -> None:
    studio = Studio(tmp_path / "runs")
    studio.create()
    for number in range(200):
        shade = (number, 255 - number, (number * 7) % 256)
        path = write_image(studio.image_set("many") / f"p{number:03}.png", shade, (64, 64 + number % 3))
        path.with_suffix(".txt").write_text(f"number {number}", encoding="utf-8")
    write_draft(studio, Draft(images="many"))
    with open_studio(studio.runs) as opened, browser_page(browser, opened) as page:
        page.locator("#cards .card").nth(47).wait_for()
        assert page.locator("#cards .card").count() == 48
        # By keyboard: a list that opens near the window's edge has options outside of it.
        page.locator("#cards-page input").fill("193 to 200")
        page.get_by_role("option", name="193 to 200 of 200", exact=True).wait_for()
        page.locator("#cards-page input").press("Enter")
        page.get_by_label("Caption of p199.png").wait_for()
        sync_api.expect(page.locator("#cards .card")).to_have_count(8)
        page.locator("#cards-only input").fill("number 19")
        page.locator("#cards-only input").press("Enter")
        page.get_by_label("Caption of p019.png").wait_for()
        sync_api.expect(page.locator("#cards .card")).to_have_count(11)
        # The set was looked at meanwhile, and what is chosen stays.
        page.wait_for_function("!document.querySelector('#set-summary').innerText.includes('looking at')")
        assert page.locator("#cards .card").count() == 11


def test_what_was_asked_about_is_what_is_deleted(browser: Any, filled: Open, tmp_path: Path) -> None:
    studio = Studio(filled.runs)
    write_state(studio, parse_config({"data": {"folder": str(tmp_path)}}, name="old"), status="done")
    with browser_page(browser, filled) as page:
        choose_run(page, "old")
        tab(page, "Runs")
        page.click("#delete")
        page.locator("#runs-note", has_text="'old' goes to the bin").wait_for()
        shutil.rmtree(studio.run("old"))  # as by another tab: this one then looks at the next run
        page.wait_for_function("document.querySelector('#run input').value !== 'old'")
        page.click("#really-delete")
        page.locator("#runs-note", has_text="no run called 'old'").wait_for()
        assert studio.run("copies").is_dir() and studio.run("fails").is_dir()


def choose_run(page: Any, name: str) -> None:
    page.locator("#run input").click()
    page.get_by_role("option", name=name, exact=True).click()
    tab(page, "Training")
    page.locator("#status h2", has_text=name).wait_for()


def test_a_first_run_takes_five_decisions_and_eight_clicks(browser: Any, tmp_path: Path) -> None:
    images = sorted(resolve_data_folder("builtin:zumi").glob("zumi_*"))
    with open_studio(tmp_path / "runs") as studio, browser_page(browser, studio) as page:
        page.evaluate("window.clicks = 0; addEventListener('click', e => { window.clicks += e.isTrusted }, true)")
        with page.expect_file_chooser() as chooser:
            page.locator("#drop button").first.click()
        chooser.value.set_files(images)
        page.locator("#cards .card").nth(23).wait_for()
        page.locator("#trigger input, #trigger textarea").click()
        page.keyboard.type("zumi")
        page.click("#to-recipe")
        page.locator("#plan", has_text="The trigger word is “zumi”").wait_for()
        asked = page.locator("#subject, #length, #base, #name")
        fields = page.locator("fieldset, textarea, input:not([type=radio]):not([type=file])").locator("visible=true")
        assert asked.count() == 4
        assert fields.count() == 4 + 1, "these beside the trigger word, and which run is looked at"
        page.click("#start")
        page.locator("#status h2", has_text="my images").wait_for()
        assert page.evaluate("window.clicks") <= 8
        (worker,) = studio.workers()
        worker.kill()
