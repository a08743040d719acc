"""Draws the images that the README and docs/studio.md show, from a finished run of the quickstart.

    python docs/make_images.py runs/quickstart

needs the `dev` extra and Chromium. It reads the run and never changes it.
"""

from __future__ import annotations

import argparse
import base64
import html
import io
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps
from playwright.sync_api import Browser, Page, sync_playwright

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from helpers.browsing import CHROMIUM, PATIENCE_MS, enter, open_studio

from sdlora.common.bundled import resolve_data_folder
from sdlora.copycheck.verdict import EpochCheck, read_checks
from sdlora.lora_files.read import read_file
from sdlora.ui.settings.draft import Draft, write_draft
from sdlora.ui.state.folders import Studio

TARGET = Path(__file__).parent / "images"
COPY_CHECK = 3  # the page that the README shows, counted from the left
PROMPTS = ("zumi in a meadow", "a red cat in the forest")
SPRITE_PX = 64  # shown at twice its size on a page, and drawn at four times for screens of two pixels a point
COLORS = {
    "light": {"text": "#1f2328", "faint": "#59636e", "clean": "#1a7f37", "watch": "#9a6700", "copying": "#cf222e"},
    "dark": {"text": "#f0f6fc", "faint": "#9198a1", "clean": "#3fb950", "watch": "#d29922", "copying": "#f85149"},
}
STYLE = """
body { margin: 0; font: 14px/20px "Liberation Sans", Arial, sans-serif; color: TEXT; }
#row { display: grid; grid-template-columns: repeat(6, 128px); gap: 6px 12px; width: 828px; text-align: center; }
#row img { width: 128px; height: 128px; display: block; border-radius: 6px; image-rendering: pixelated; }
.head { font-weight: bold; } .faint { color: FAINT; font-weight: normal; }
.prompt { grid-column: 2 / -1; text-align: left; margin-top: 2px; } .left { grid-column: 1; margin-top: 2px; }
"""


def progress_page(run: Path, theme: str) -> str:
    """HTML of a grid: training images, base model and epochs from left to right, the verdict under each."""
    colors, checks = COLORS[theme], read_checks(run / "epochs")
    images = resolve_data_folder("builtin:zumi")
    captions = {file.with_suffix(".png"): file.read_text().strip() for file in sorted(images.glob("*.txt"))}
    kept = int(read_file(next(run.glob("*.safetensors"))).metadata["ss_epoch"])
    cells = ["training image", "base model", *(f"epoch {epoch}" for epoch in sorted(checks)[1:])]
    body = [f'<div class="head">{cell}</div>' for cell in cells]
    for prompt in PROMPTS:
        nearest = max(captions, key=lambda file: len(set(captions[file].split()) & set(prompt.split())))
        body.append('<div class="left"></div>')
        body.append(f'<div class="prompt faint">prompt: {html.escape(prompt)}</div>')
        files = [
            nearest,
            *(preview(run / "epochs" / str(epoch), check, prompt) for epoch, check in sorted(checks.items())),
        ]
        body += [f'<img src="{data_url(file)}" alt="">' for file in files]
    body.append(f'<div class="faint">{len(captions)} in all</div>')
    for epoch, check in sorted(checks.items()):
        mark = ", kept" if epoch == kept else ""
        body.append(f'<div style="color:{colors[check.verdict]}">● {check.verdict}{mark}</div>')
    style = STYLE.replace("TEXT", colors["text"]).replace("FAINT", colors["faint"])
    return f'<style>{style}</style><div id="row">{"".join(body)}</div>'


def preview(epoch: Path, check: EpochCheck, prompt: str) -> Path:
    """The preview of a prompt in the folder of an epoch."""
    (match,) = [match for match in check.previews if match.prompt == prompt]
    return epoch / match.file


def data_url(file: Path) -> str:
    """An image as part of a page."""
    with Image.open(file) as image:
        assert image.size == (SPRITE_PX, SPRITE_PX), f"{file} is {image.size}, not a sprite of the built-in base"
    return f"data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()}"


def draw_progress(browser: Browser, run: Path) -> None:
    """Write the row of images on top of the README, for light and dark pages."""
    for theme in COLORS:
        page = browser.new_page(device_scale_factor=2)
        page.set_content(progress_page(run, theme))
        shot = page.locator("#row").screenshot(omit_background=True)
        image = Image.open(io.BytesIO(shot))
        image.quantize(256, method=Image.Quantize.FASTOCTREE).save(TARGET / f"quickstart-{theme}.png", optimize=True)
        page.close()


@contextmanager
def studio_of(run: Path) -> Iterator[Any]:
    """A studio on a copy of the run, with the training images as a set."""
    with tempfile.TemporaryDirectory() as folder:
        studio = Studio(Path(folder) / "runs")
        studio.create()
        shutil.copytree(run, studio.run("quickstart"))
        shutil.copytree(resolve_data_folder("builtin:zumi"), studio.image_set("zumi"), dirs_exist_ok=True)
        write_draft(studio, Draft(images="zumi").with_values({"data.trigger": "zumi"}))
        with open_studio(studio.runs) as opened:
            yield opened


def shoot(page: Page, tab: int) -> Image.Image:
    """One page of the studio, once its images are there."""
    page.get_by_role("tab").nth(tab).click()
    page.wait_for_function("[...document.images].every(one => one.complete || one.loading === 'lazy')")
    page.wait_for_timeout(2500)  # the pages poll the run folder
    return Image.open(io.BytesIO(page.screenshot())).convert("RGB")


def pages(browser: Browser, studio: Any, theme: str, size: tuple[int, int], scale: float) -> list[Image.Image]:
    """The studio's six pages at a size of the window."""
    context = browser.new_context(
        viewport={"width": size[0], "height": size[1]}, color_scheme=theme, device_scale_factor=scale
    )
    context.set_default_timeout(PATIENCE_MS)
    page = context.new_page()
    enter(page, studio)
    shots = [shoot(page, tab) for tab in range(page.get_by_role("tab").count())]
    context.close()
    return shots


def tiled(shots: list[Image.Image], columns: int, gap: int = 16) -> Image.Image:
    """Images of one size, side by side."""
    width, height = shots[0].size
    rows = -(-len(shots) // columns)
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "#8c959f")
    for number, shot in enumerate(shots):
        sheet.paste(shot, (number % columns * (width + gap), number // columns * (height + gap)))
    return sheet


def draw_studio(browser: Browser, run: Path) -> None:
    """Write the studio's pages: one for the README in light and dark, all six for docs/studio.md."""
    with studio_of(run) as studio:
        for theme in COLORS:
            shots = pages(browser, studio, theme, (1104, 640), 1.5)
            framed = ImageOps.expand(shots[COPY_CHECK], 2, "#8c959f")
            framed.save(TARGET / f"studio-{theme}.webp", quality=90, method=6)
            if theme == "light":
                tiled(shots, 2).resize((1672, 1471)).save(TARGET / "studio-desk.webp", quality=80, method=6)
        phone = pages(browser, studio, "dark", (390, 780), 1.5)
        tiled(phone, 6).save(TARGET / "studio-phone.webp", quality=80, method=6)


def main() -> None:
    """Write all images, or those of one kind."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="the folder of a finished quickstart run")
    parser.add_argument("--only", choices=["progress", "studio"], help="write only these images")
    asked = parser.parse_args()
    TARGET.mkdir(exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        if asked.only != "studio":
            draw_progress(browser, asked.run)
        if asked.only != "progress":
            draw_studio(browser, asked.run)
        browser.close()


if __name__ == "__main__":
    main()
