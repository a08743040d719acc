"""What an artist does beside training, in a browser: trying, comparing, captioning, queueing, publishing."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from helpers.browsing import CHROMIUM, Open, browser_page, open_studio, tab
from helpers.studios import write_state

from sdlora.common.bundled import resolve_data_folder
from sdlora.common.files import write_json
from sdlora.config.schema import RunConfig
from sdlora.config.toml import parse_config
from sdlora.events import to_json
from sdlora.run.run import start
from sdlora.ui.settings.draft import Draft, read_draft, write_draft
from sdlora.ui.state.background_tasks import BackgroundTasks
from sdlora.ui.state.folders import Studio
from sdlora.ui.state.queue import Job, Jobs

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = [pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium"), pytest.mark.slow]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Callable[..., RunConfig]:
    """Settings of a run that takes seconds, by name."""
    cache = tmp_path_factory.mktemp("cache")

    def made(name: str, **train: Any) -> RunConfig:
        raw = {
            "base": {"path": str(tiny_base)},
            "data": {"folder": "builtin:zumi", "resolution_px": 32, "bucket_step_px": 8, "repeats": 1},
            "train": {"epochs": 2, "batch_size": 8, "learning_rate": 0.02, "device": "cpu", **train},
            "preview": {"num_captions": 1, "prompts": ["a ball"], "num_steps": 2, "seeds": [0]},
            "copycheck": {"enabled": False},
            "cache": {"dir": str(cache)},
        }
        return parse_config(raw, name=name)

    return made


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory, settings: Callable[..., RunConfig]) -> Iterator[Open]:
    """A studio with a set of images, a finished run and another one's settings, which differ in name and seed."""
    studio = Studio(tmp_path_factory.mktemp("work") / "runs")
    studio.create()
    folder = studio.image_set("set")
    folder.mkdir()
    for file in sorted(resolve_data_folder("builtin:zumi").glob("zumi_0[0-3].*")):
        shutil.copy(file, folder)
    write_draft(studio, Draft(images="set").with_values({"data.trigger": "glimmer"}))
    for _ in start(settings("first").model_copy(update={"seed": 1}), studio.run("first")):
        pass
    write_state(studio, settings("second").model_copy(update={"seed": 2}), status="done")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", "hf_of_nobody")
        patch.setenv("HF_HUB_OFFLINE", "1")
        with open_studio(studio.runs) as found:
            yield found


@pytest.fixture(scope="module")
def page(opened: Open) -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        with browser_page(browser, opened) as found:
            yield found
        browser.close()


def choose(page: Any, box: str, name: str) -> None:
    """Pick an entry of a list."""
    page.locator(f"{box} input").click()
    page.get_by_role("option", name=name, exact=True).click()
    page.wait_for_function("([box, name]) => document.querySelector(`${box} input`).value === name", arg=[box, name])


def choose_run(page: Any, name: str) -> None:
    choose(page, "#run", name)
    tab(page, "Training")
    page.locator("#status h2", has_text=re.compile(f"^{name}$")).wait_for()


def unfold(page: Any, box: str) -> None:
    """Open what is folded away."""
    if page.locator(f"{box} > button:not(.open)").count():
        page.click(f"{box} > button")


def captions(opened: Open) -> list[str]:
    return [
        file.read_text(encoding="utf-8").strip() for file in sorted((opened.runs / "pictures" / "set").glob("*.txt"))
    ]


def drawn(page: Any, *labels: str) -> list[str]:
    """Where the images are that were drawn last, once there are those with these labels and no others."""
    page.wait_for_function(
        "wanted => [...document.querySelectorAll('#tried figcaption')].map(c => c.innerText).join() === wanted",
        arg=",".join(labels),
    )
    page.wait_for_function("[...document.querySelectorAll('#tried img')].every(one => one.complete)")
    # What an image shows, not what it is called.
    return page.locator("#tried img").evaluate_all("""all => all.map(one => {
        const size = { width: one.naturalWidth, height: one.naturalHeight };
        const canvas = Object.assign(document.createElement('canvas'), size);
        canvas.getContext('2d').drawImage(one, 0, 0);
        return canvas.toDataURL();
    })""")


def test_words_are_exchanged_in_all_captions_and_the_trigger_is_put_in(page: Any, opened: Open) -> None:
    tab(page, "Images")
    page.locator("#cards .card").nth(3).wait_for()
    before = captions(opened)
    assert len(before) == 4 and all("zumi" in caption for caption in before)
    unfold(page, "#all-captions")
    page.get_by_label("Find", exact=True).fill("zumi")
    page.get_by_label("Replace with", exact=True).fill("<b>moss</b> cat")
    page.get_by_role("button", name="Replace in all captions").click()
    page.locator("#apply-captions", has_text="Change 4 captions").click()
    page.locator("#captions-note", has_text="4 captions were changed.").wait_for()
    assert captions(opened) == [caption.replace("zumi", "<b>moss</b> cat") for caption in before]
    # A word that stands nowhere changes nothing.
    page.get_by_role("button", name="Replace in all captions").click()
    page.locator("#captions-note", has_text="No caption would change.").wait_for()
    page.get_by_role("button", name="Add the trigger word to all captions").click()
    page.locator("#captions-note ins").nth(3).wait_for()
    page.click("#apply-captions")
    page.locator("#captions-note", has_text="4 captions were changed.").wait_for()
    after = captions(opened)
    assert after == [f"glimmer, {caption.replace('zumi', '<b>moss</b> cat')}" for caption in before]
    assert page.locator("#cards textarea").evaluate_all("all => all.map(one => one.value)") == after


def test_an_epoch_is_tried_at_three_strengths_and_beside_another(page: Any, opened: Open) -> None:
    choose_run(page, "first")
    tab(page, "Result")
    page.fill("#try-prompt textarea, #try-prompt input", "a ball")
    choose(page, "#try-epoch", "2")
    page.click("#try-strip")
    strengths = ("strength 0 (the base)", "strength 0.5", "strength 1")
    base, half, whole = drawn(page, *(f"epoch 2, {one}" for one in strengths))
    assert len({base, half, whole}) == 3
    choose(page, "#try-other", "1")
    page.get_by_role("button", name="Draw both epochs").click()
    second, first = drawn(page, "epoch 2, strength 1", "epoch 1, strength 1")
    assert second == whole and first not in (base, whole)
    page.fill("#try-strength input[type=number]", "0")
    page.keyboard.press("Tab")
    page.get_by_role("button", name="Draw both epochs").click()
    assert drawn(page, "epoch 2, strength 0 (the base)", "epoch 1, strength 0 (the base)") == [base, base]


def test_a_run_is_compared_and_cloned(page: Any, opened: Open) -> None:
    choose_run(page, "first")
    tab(page, "Runs")
    choose(page, "#compare-with", "second")
    page.get_by_role("button", name="Compare settings").click()
    table = page.locator("#runs-note table")
    table.wait_for()
    rows = table.locator("tr").evaluate_all("all => all.map(row => [...row.children].map(cell => cell.innerText))")
    assert rows == [["Setting", "first", "second"], ["name", "first", "second"], ["seed", "1", "2"]]

    page.click("#clone")
    page.locator("#name").wait_for()
    assert page.locator("#name input, #name textarea").input_value() == "first-2"
    draft = read_draft(Studio(opened.runs))
    assert (draft.name, draft.images, draft.value("seed")) == ("first-2", "builtin:zumi", 1)
    assert draft.value("train.learning_rate") == 0.02
    page.locator("#plan", has_text="each seen 2 times").wait_for()


def test_the_queue_is_put_into_another_order(page: Any, opened: Open, settings: Callable[..., RunConfig]) -> None:
    jobs = Jobs(Studio(opened.runs))
    # It stands for a run at work: the device is taken for as long as it lives.
    with subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"]) as taken:
        began = psutil.Process(taken.pid).create_time()
        write_json(jobs.studio.job_record("busy"), to_json(Job("busy", "cpu", 0.0, "started", False, taken.pid, began)))
        for name in ("a", "b", "c"):
            jobs.add(settings(name))
        tab(page, "Training")
        unfold(page, "#queue-box")

        def queue(*names: str) -> None:
            page.wait_for_function(
                "wanted => [...document.querySelectorAll('#queue li')].map(one => one.innerText).join() === wanted",
                arg=",".join(names),
            )
            assert [job.name for job in jobs.waiting()] == list(names)

        queue("a", "b", "c")
        choose(page, "#waiting", "c")
        page.click("#earlier")
        queue("a", "c", "b")
        choose(page, "#waiting", "a")
        page.click("#later")
        queue("c", "a", "b")
        page.locator("#strip", has_text="number 1 in the queue").wait_for()
        choose(page, "#waiting", "c")
        page.click("#cancel")
        page.locator("#training-note", has_text=re.compile("'c'.*queue")).wait_for()
        queue("a", "b")
        for name in ("a", "b"):
            jobs.cancel(name)
        jobs.studio.job_record("busy").unlink()
        taken.kill()
    page.locator("#strip", has_text="Nothing is training").wait_for()


def test_what_was_asked_about_is_what_is_published(page: Any, opened: Open) -> None:
    choose_run(page, "first")
    tab(page, "Result")
    unfold(page, "#publishing")
    page.locator("#repo input, #repo textarea").fill("me/first")
    page.click("#publish")
    page.locator("#publish-note", has_text="Publish first?").wait_for()
    assert "visible to you alone" in page.inner_text("#publish-note")
    assert "first.safetensors" in page.inner_text("#publish-note")
    # Another run is another question.
    choose(page, "#run", "second")
    page.locator("#really-publish").wait_for(state="hidden")
    choose(page, "#run", "first")
    page.click("#publish")
    page.locator("#publish-note", has_text="Publish first?").wait_for()
    first = opened.runs / "first"
    away = first.rename(first.with_name(".away"))  # as by another tab: this one then looks at the next run
    page.wait_for_function("document.querySelector('#run input').value === 'second'")
    page.click("#really-publish")
    page.locator("#publish-note", has_text="'first'").wait_for()
    assert BackgroundTasks(Studio(opened.runs)).find("publish") is None, (
        "nothing was sent for the run that is looked at now"
    )
    away.rename(first)
    choose(page, "#run", "first")
    page.click("#publish")
    page.locator("#really-publish").click()
    # Without a network there is no Hub; what is told says of which run.
    page.locator("#publish-told", has_text="Upload of first: failed").wait_for()
