"""From a folder of images to a LoRA that loads, in a browser; left out where there is no Chromium."""

from __future__ import annotations

import hashlib
import io
import time
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.browsing import CHROMIUM, PATIENCE_MS, Open, browser_page, enter, open_studio, tab
from helpers.promises import Figure
from PIL import Image

from sdlora.common.bundled import pocket_folder, resolve_data_folder

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = [pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium"), pytest.mark.slow]

QUICK = """
name = "zumi"
[data]
folder = "{folder}"
trigger = "zumi"
repeats = 6
[lora]
rank = 16
alpha = 16
targets = ["cross_attention", "self_attention", "mlp"]
[train]
epochs = 3
batch_size = 4
learning_rate = 2e-3
log_every_steps = 2
[preview]
prompts = ["zumi in a meadow", "a big zumi at night"]
num_captions = 2
num_steps = 4
guidance = 2.0
seeds = [0]
[cache]
dir = "{cache}"
"""
LONG = """
name = "long"
[base]
path = "{base}"
[data]
folder = "builtin:zumi"
resolution_px = 32
bucket_step_px = 8
repeats = 1000
[train]
epochs = 5
checkpoint_every_steps = 20
log_every_steps = 2
[preview]
enabled = false
[copycheck]
enabled = false
[cache]
dir = "{cache}"
"""


def load_settings(page: Any, file: Path) -> None:
    tab(page, "Recipe")
    page.locator("input[type=file][accept*=toml]").set_input_files(file)
    page.locator("#recipe-note", has_text="The settings were loaded").wait_for()


def drawn(page: Any, studio: Open, label: str) -> np.ndarray[Any, Any]:
    """The image that was drawn last, once it is there."""
    image = page.locator("#tried figure", has_text=label).locator("img")
    image.wait_for()
    with urllib.request.urlopen(studio.url + image.get_attribute("src")) as answer:
        return np.asarray(Image.open(io.BytesIO(answer.read())).convert("RGB")).astype(int)


def reference(prompt: str, lora: Path | None) -> np.ndarray[Any, Any]:
    """The same image by diffusers alone."""
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(pocket_folder(), safety_checker=None)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(
        pipeline.scheduler.config, algorithm_type="dpmsolver++", use_karras_sigmas=True
    )
    pipeline.set_progress_bar_config(disable=True)
    if lora is not None:
        pipeline.load_lora_weights(str(lora))
    result = pipeline(
        prompt, num_inference_steps=4, guidance_scale=2.0, negative_prompt="",
        generator=torch.Generator("cpu").manual_seed(7),
    )  # fmt: skip
    return np.asarray(result.images[0]).astype(int)


def test_from_images_to_a_lora(browser: Any, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    images = sorted(resolve_data_folder("builtin:zumi").glob("zumi_*"))
    with open_studio(runs) as studio, browser_page(browser, studio) as page:
        page.set_input_files("#drop input[type=file]", images)
        page.locator("#cards .card").nth(23).wait_for()
        assert page.locator("#cards .card").count() == 24
        assert "no problems found" in page.inner_text("#set-summary")
        area = page.get_by_label("Caption of zumi_00.png")
        area.fill("zumi waving, edited in the browser")
        page.locator(".card", has=area).locator(".saved", has_text="Saved").wait_for()
        folder = runs / "pictures" / "my images"
        assert (folder / "zumi_00.txt").read_text(encoding="utf-8") == "zumi waving, edited in the browser"

        file = tmp_path / "quick.toml"
        file.write_text(QUICK.format(folder=folder, cache=tmp_path / "cache"), encoding="utf-8")
        load_settings(page, file)
        page.locator("#plan", has_text="18 times").wait_for()
        assert "22 images" in page.inner_text("#plan")
        page.dblclick("#start")
        page.locator("#status h2", has_text="zumi").wait_for()
        page.locator("#grid", has_text="base").locator(".tile").first.wait_for()
        assert len(studio.workers()) == 1

        enter(page, studio)  # a reload in mid-run
        assert page.locator("#run input").input_value() == "zumi"
        tab(page, "Copy check")
        for epoch in ("1", "2"):
            page.locator(f"#copy-epoch input[value='{epoch}']").wait_for()
            page.locator(f"#pair-{epoch}-0 .training img").first.wait_for()
            assert page.locator(f"#pairs [id^=pair-{epoch}-]").count() == 4
        assert page.locator("#pairs img").evaluate_all("all => all.every(one => one.alt)")

        tab(page, "Training")
        pressed = time.monotonic()
        page.click("#stop")
        page.locator("#training-note", has_text="Stopping").wait_for(timeout=2000)
        assert time.monotonic() - pressed < 2.5
        page.locator("#status", has_text="Its state is saved").wait_for()
        assert not studio.workers()
        page.click("#resume")
        page.locator("#status", has_text="Every epoch is complete").wait_for()

        tab(page, "Result")
        page.locator("#result a.primary").wait_for()
        assert "is recommended" in page.inner_text("#result")
        with page.expect_download() as waiting:
            page.click("#result a.primary")
        lora = tmp_path / waiting.value.suggested_filename
        waiting.value.save_as(lora)
        assert lora.name == "zumi.safetensors"
        assert digest(lora) == digest(runs / "zumi" / "zumi.safetensors")

        prompt = "a big zumi by the sea"
        page.fill("#try-prompt textarea, #try-prompt input", prompt)
        page.fill("#try-seed input", "7")
        page.click("#try")
        with_lora = drawn(page, studio, "strength 1")
        page.fill("#try-strength input[type=number]", "0")
        page.keyboard.press("Tab")
        page.click("#try")
        without = drawn(page, studio, "the base")
        assert np.array_equal(without, reference(prompt, None)), "at strength 0 it is the base's image"
        assert np.abs(with_lora - reference(prompt, lora)).max() <= 2, "the file gives the same image in diffusers"
        assert np.abs(with_lora - without).max() > 20


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def test_one_worker_whatever_the_browser_does(browser: Any, tmp_path: Path, tiny_base: Path, figure: Figure) -> None:
    file = tmp_path / "long.toml"
    file.write_text(LONG.format(base=tiny_base, cache=tmp_path / "cache"), encoding="utf-8")
    with open_studio(tmp_path / "runs") as studio, browser_page(browser, studio) as page:
        load_settings(page, file)
        page.dblclick("#start")
        page.locator("#status", has_text="training, step").wait_for()
        (worker,) = studio.workers()
        for _ in range(20):
            page.reload()
            page.locator("#strip", has_text="long").wait_for()
        tabs = [page.context.new_page() for _ in range(9)]
        for other in tabs:
            enter(other, studio)
        for other in (page, *tabs):
            other.locator("#strip", has_text="training, step").wait_for()
            assert other.locator("#run input").input_value() == "long"
        for other in tabs:
            other.close()
        assert studio.workers() == [worker]
    figure("Browser", "two clicks, 20 reloads, 10 tabs: one process, the same state in each")


def test_a_killed_worker_is_told_and_resumed(browser: Any, tmp_path: Path, tiny_base: Path, figure: Figure) -> None:
    file = tmp_path / "long.toml"
    file.write_text(LONG.format(base=tiny_base, cache=tmp_path / "cache"), encoding="utf-8")
    with open_studio(tmp_path / "runs") as studio:
        with browser_page(browser, studio) as page:
            load_settings(page, file)
            page.click("#start")
            page.locator("#status", has_text="training, step").wait_for()
        # Closed and opened again, the page finds its run.
        with browser_page(browser, studio) as page:
            tab(page, "Training")
            page.locator("#status", has_text="training, step").wait_for()
            checkpoints = tmp_path / "runs" / "long" / "checkpoints"
            wait_for_checkpoint(page, checkpoints)
            (worker,) = studio.workers()
            killed = time.monotonic()
            worker.kill()
            page.locator("#status", has_text="The run failed").wait_for(timeout=10_000)
            told = time.monotonic() - killed
            assert "Press Resume" in page.inner_text("#status")
            page.click("#resume")
            page.locator("#status", has_text="training, step").wait_for()
            (again,) = studio.workers()
            assert again != worker
            log = (tmp_path / "runs" / "long" / "log.txt").read_text(encoding="utf-8")
            assert "Resumed at step" in log
            page.click("#pause")
            page.locator("#status .chip", has_text="paused").wait_for()
            page.click("#continue")
            page.locator("#status .chip", has_text="running").wait_for()
            page.click("#stop")
            page.locator("#status", has_text="Its state is saved").wait_for()
    figure("Dead worker", f"told {told:.1f} s after SIGKILL; resumed from its checkpoint")


def wait_for_checkpoint(page: Any, checkpoints: Path) -> None:
    until = time.monotonic() + PATIENCE_MS / 1000
    while not list(checkpoints.glob("*/complete.json")):
        assert time.monotonic() < until, "there is no checkpoint"
        page.wait_for_function("true")
