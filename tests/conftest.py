"""Options and fixtures that all tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from diffusers import StableDiffusionPipeline
from helpers.adapters import trained
from helpers.browsing import CHROMIUM
from helpers.commandline import CommandLine
from helpers.promises import Figure, record
from helpers.quick import leave_out_fsync
from helpers.tiny import TINY, make_tiny_pipeline
from PIL import Image, ImageDraw

from sdlora.lora.inject import LoraState
from sdlora.models.architectures import ARCHITECTURES


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests that take minutes")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--slow"):
        return
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs --slow"))


@pytest.fixture(scope="session", autouse=True)
def _unsynced() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        leave_out_fsync(patch.setattr)
        yield


@pytest.fixture
def figure() -> Figure:
    """Keeps what a test found for docs/reliability.md, if SDLORA_RECORD is set."""
    return record if os.environ.get("SDLORA_RECORD") else lambda *_: None


@pytest.fixture(scope="session")
def command(tmp_path_factory: pytest.TempPathFactory) -> CommandLine:
    """The command line in processes that are forked, so that each begins at once."""
    return CommandLine(tmp_path_factory.mktemp("commands"))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium; files that use it are left out where it is missing."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random base, in a folder."""
    folder = tmp_path_factory.mktemp("base") / "tiny"
    make_tiny_pipeline(folder)
    return folder


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five captioned images of 32 px, two of them wide."""
    folder = tmp_path_factory.mktemp("data") / "set"
    folder.mkdir()
    for index, color in enumerate(("red", "green", "blue", "orange", "purple")):
        image = Image.new("RGB", (64, 32) if index > 2 else (32, 32), "white")
        ImageDraw.Draw(image).ellipse((4 + index, 4, 24, 26), fill=color)
        image.save(folder / f"{color}.png")
        (folder / f"{color}.txt").write_text(f"a {color} ball", encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def others(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three further captioned images, to hold out."""
    folder = tmp_path_factory.mktemp("data") / "others"
    folder.mkdir()
    for index, color in enumerate(("black", "brown", "pink")):
        image = Image.new("RGB", (64, 32) if index > 1 else (32, 32), "white")
        ImageDraw.Draw(image).rectangle((4 + index, 6, 22, 26), fill=color)
        image.save(folder / f"{color}.png")
        (folder / f"{color}.txt").write_text(f"a {color} box", encoding="utf-8")
    return folder


@pytest.fixture
def overrides(tiny_base: Path, images: Path, tmp_path: Path) -> list[str]:
    """Settings of a run that takes a second or two."""
    return [
        f"base.path={tiny_base}", "base.family=any", f"data.folder={images}", f"cache.dir={tmp_path / 'cache'}",
        "data.resolution_px=32", "data.bucket_step_px=8", "preview.num_steps=2", 'preview.prompts=["a red ball"]',
        "train.device=cpu", "train.precision=fp32", "train.epochs=2", "train.batch_size=2", "lora.rank=4",
        "lora.alpha=4", "preview.seeds=[0]", "preview.num_captions=0", "copycheck.enabled=false",
    ]  # fmt: skip


@pytest.fixture
def pipeline(tiny_base: Path) -> Any:
    """The tiny base as any diffusers user loads it."""
    return StableDiffusionPipeline.from_pretrained(tiny_base, safety_checker=None)


@pytest.fixture
def unet(pipeline: Any) -> Any:
    return pipeline.unet


@pytest.fixture
def state(unet: Any) -> LoraState:
    adapter = trained(unet)
    adapter.remove()
    return adapter.state()


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the tiny shapes for the families' own, as a file in one holds no configuration."""
    for family, architecture in TINY.items():
        monkeypatch.setitem(ARCHITECTURES, family, architecture)
