"""Copy checks for tests: what two epochs of two previews each may look like, and images with parts to be found."""

from __future__ import annotations

import random
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, cast

from PIL import Image, ImageDraw

from sdlora.copycheck.verdict import EpochCheck, Match

Result = TypeVar("Result")

CLEAN = Match("zumi at night", "training", 0, "a.png", 0.41, 0.7, 0.25, False, "previews/p0.png")
NOVEL = Match("zumi & <b>friends</b>", "novel", 0, "b.png", 0.31, 0.6, 0.9, False, "previews/p1.png")
COPY = replace(NOVEL, nearest="<a>.png", hp_ms=0.97, p_value=1 / 145, significant=True)


def signal(value: float | None, p_value: float | None) -> dict[str, Any]:
    outside = p_value is not None and p_value <= 0.05
    return {"value": value, "p_value": p_value, "outside": outside, "meaning": "What <it> means."}


def check(verdict: Any = "clean", *previews: Match, **signals: dict[str, Any]) -> EpochCheck:
    shown = list(previews) or [CLEAN, NOVEL]
    share = sum(match.significant for match in shown) / len(shown)
    return EpochCheck(verdict, f"Because it is <{verdict}>.", share, share / 4, 0.0027, signals, shown)


def image(color: str, size: tuple[int, int] = (32, 32)) -> Image.Image:
    made = Image.new("RGB", size, color)
    ImageDraw.Draw(made).rectangle((4, 4, 12, 12), fill="black")
    return made


GALLERY = {"a.png": image("red"), "b.png": image("lime"), "<a>.png": image("blue")}


def write_epochs(folder: Path, checks: dict[int, EpochCheck], color: str = "yellow") -> None:
    """Epochs' folders with their checks and one-coloured previews."""
    for epoch, found in checks.items():
        (folder / str(epoch) / "previews").mkdir(parents=True)
        for match in found.previews:
            image(color).save(folder / str(epoch) / match.file)
        found.write(folder / str(epoch))


def drained(events: Generator[Any, None, Result]) -> Result:
    """What a generator of events returns."""
    while True:
        try:
            next(events)
        except StopIteration as end:
            return cast(Result, end.value)


def textured(seed: int, size: int = 256) -> Image.Image:
    """An image of many small shapes."""
    draw, image = random.Random(seed), Image.new("RGB", (size, size), "white")
    pen = ImageDraw.Draw(image)
    for _ in range(300):
        x, y, edge = draw.randrange(size), draw.randrange(size), draw.randrange(4, 24)
        pen.rectangle((x, y, x + edge, y + draw.randrange(4, 24)), fill=tuple(draw.randrange(256) for _ in range(3)))
    return image
