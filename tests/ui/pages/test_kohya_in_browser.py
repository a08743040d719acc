"""A whole way in a browser: kohya's folders in a zip, without captions, to a LoRA that diffusers loads."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.browsing import CHROMIUM, Open, browser_page, enter, open_studio, tab
from helpers.studios import write_image
from helpers.taggers import write_onnx

pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytestmark = [pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium"), pytest.mark.slow]

SETTINGS = """
name = "mizu"
[base]
path = "{base}"
[data]
folder = "{folder}"
trigger = "mizu"
resolution_px = 32
bucket_step_px = 8
[lora]
rank = 4
[train]
epochs = 3
batch_size = 4
device = "cpu"
learning_rate = 1e-2
log_every_steps = 2
[preview]
prompts = ["mizu in a meadow"]
num_captions = 1
num_steps = 2
seeds = [0]
[cache]
dir = "{cache}"
"""


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """Twenty images that are each seen thirty times an epoch, and three that keep what the base model knows."""
    images = tmp_path / "images"
    for number in range(20):
        shade = (255, number * 6, 20) if number % 2 else (20, number * 6, 255)
        write_image(images / "30_mizu" / f"m{number:02}.png", shade, (40, 40))
    for number in range(3):
        write_image(images / "reg" / "1_thing" / f"r{number}.png", (40, 200, number * 40), (40, 40))
    file = tmp_path / "kohya.zip"
    with zipfile.ZipFile(file, "w") as packed:
        for image in sorted(images.rglob("*.png")):
            packed.write(image, f"train/{image.relative_to(images)}")
    return file


@pytest.fixture
def studio(tmp_path: Path) -> Iterator[Open]:
    with open_studio(tmp_path / "runs") as found:
        yield found


def wait_for_caption(page: Any, name: str, text: str) -> None:
    page.wait_for_function(
        "([name, text]) => document.querySelector(`[data-image='${name}'] textarea`)?.value.includes(text)",
        arg=[name, text],
    )


@pytest.mark.timeout(1800)
def test_from_kohyas_folders_to_a_lora(
    browser: Any, studio: Open, archive: Path, tmp_path: Path, tiny_base: Path
) -> None:
    folder = studio.runs / "pictures" / "my images"
    captions = folder / "30_mizu"
    with browser_page(browser, studio) as page:
        page.set_input_files("#drop input[type=file]", archive)
        page.locator("#cards .card").nth(19).wait_for()
        assert "20 images, 0 captioned, and 3 in reg/1_thing" in page.inner_text("#set-summary")

        # Captions by a tagger.
        page.click("#model-captions > button")
        page.locator("#captions-as label", has_text="booru tags").click()
        page.locator("#captioner input, #captioner textarea").fill(str(write_onnx(tmp_path / "tagger")))
        page.click("#ask-captions")
        page.locator("#caption-told", has_text="done").wait_for()
        wait_for_caption(page, "30_mizu/m01.png", "red theme")
        wait_for_caption(page, "30_mizu/m02.png", "blue theme")

        # Edited: one, one of its tags, and all; and undone.
        area = page.get_by_label("Caption of 30_mizu/m01.png")
        area.fill("mizu, red theme, waving")
        card = page.locator(".card", has=area)
        card.locator(".saved", has_text="Saved").wait_for()
        card.get_by_label("Remove the tag waving").click()
        card.get_by_label("Remove the tag waving").wait_for(state="detached")
        assert (captions / "m01.txt").read_text(encoding="utf-8") == "mizu, red theme"
        area.press("Control+Enter")
        assert page.evaluate("document.activeElement.ariaLabel") == "Caption of 30_mizu/m02.png"
        page.click("#all-captions > button")
        page.get_by_label("Find", exact=True).fill("blue theme")
        page.get_by_label("Replace with", exact=True).fill("at sea")
        page.get_by_role("button", name="Replace in all captions").click()
        page.locator("#apply-captions", has_text="Change 10 captions").click()
        wait_for_caption(page, "30_mizu/m02.png", "at sea")
        page.locator("#undo", has_text="10 captions were changed").click()
        wait_for_caption(page, "30_mizu/m02.png", "blue theme")
        assert "at sea" not in "".join(file.read_text() for file in captions.glob("*.txt"))

        # Trained.
        file = tmp_path / "mizu.toml"
        file.write_text(SETTINGS.format(base=tiny_base, folder=folder, cache=tmp_path / "cache"), encoding="utf-8")
        tab(page, "Recipe")
        page.locator("input[type=file][accept*=toml]").set_input_files(file)
        page.locator("#recipe-note", has_text="The settings were loaded").wait_for()
        page.locator("#plan", has_text="each seen 90 times").wait_for()
        page.click("#start")
        page.locator("#status", has_text="training, step").wait_for()
        assert page.url.endswith("#training")

        page.reload()
        page.locator("#status", has_text="training, step").wait_for()
        other = page.context.new_page()
        enter(other, studio, "training")
        other.locator("#status", has_text="training, step").wait_for()
        assert len(studio.workers()) == 1
        page.click("#stop")
        for one in (page, other):
            one.locator("#status", has_text="Its state is saved").wait_for()
        assert not studio.workers()
        other.click("#resume")
        for one in (other, page):
            one.locator("#status", has_text="Every epoch is complete").wait_for(timeout=900_000)
        assert "Resumed at step" in (studio.runs / "mizu" / "log.txt").read_text(encoding="utf-8")

        # What has been learned comes first, beside the base model.
        other.goto(studio.url)
        other.locator("#result .beside img").nth(1).wait_for()
        assert other.url.endswith("#result") and "mizu in a meadow" in other.inner_text("#result .beside")
        assert other.locator("#try-prompt textarea, #try-prompt input").input_value() == "mizu in a meadow"
        with other.expect_download() as waiting:
            other.click("#result a.primary")
        lora = tmp_path / waiting.value.suggested_filename
        waiting.value.save_as(lora)
        other.close()
    assert np.abs(drawn(tiny_base, lora) - drawn(tiny_base, None)).max() > 5


def drawn(base: Path, lora: Path | None) -> Any:
    """An image by diffusers alone."""
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
    if lora is not None:
        pipeline.load_lora_weights(str(lora))
    pipeline.set_progress_bar_config(disable=True)
    result = pipeline("mizu", num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np")
    return 255 * result.images[0].astype(float)
