"""The studio's own templates, the words for how a run stands, and images that sdlora encodes again for the browser.

What a template gives is HTML with every value escaped; the pages hand it to Gradio as it is. An image's name in the
folder that is served is the hash of what it was made of, so that it never changes and can be cached for good.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Callable
from pathlib import Path

from jinja2 import Environment
from PIL import Image

from sdlora.common.files import atomic_path
from sdlora.common.text import format_seconds
from sdlora.copycheck.scale import PHASE as COMPARING
from sdlora.data.images import load_image
from sdlora.report.html import CRISP_PX, Album, Attributes, environment

from ..state.card_filter import tags_of
from ..state.queue import Status

_PHASES = {
    "start": "preparing", "train": "training", "previews": "generating previews",
    "cache captions": "encoding captions", "cache pictures": "encoding images", "page": "writing the report",
    COMPARING: "comparing your images with each other", "more previews": "generating more previews, to be sure",
    "further previews": "generating further previews",
    "previews within an epoch": "generating previews within the epoch",
}  # fmt: skip
"""Phases, as a run writes them to `state.json`, in words."""

WORDS = {
    "waiting": "queued", "starting": "starting", "running": "running", "paused": "paused",
    "stopping": "stopping and saving", "stopped": "stopped", "failed": "failed", "done": "done", "none": "not started",
    "unreadable": "cannot be read",
}  # fmt: skip
"""The states of runs in words."""

_TONES = {
    "running": "busy", "starting": "busy", "waiting": "busy", "paused": "watch", "stopping": "watch",
    "stopped": "watch", "failed": "copying", "done": "clean", "none": "", "unreadable": "",
}  # fmt: skip
"""The colours of the states, as classes of the style sheet."""

NAME = re.compile(r"[0-9a-f]{40}\.(png|jpg)")
ROUTE = "/studio/picture"
THUMBNAIL_PX, LARGE_PX = 320, 768


def progress_words(status: Status) -> str:
    """A run's phase, step and time left."""
    state = status.state
    if state is None:
        return ""
    if status.word == "done":
        return "Every epoch is complete."
    if status.can_resume:
        return f"Reached step {state.step} of {state.total_steps}." if state.total_steps else ""
    # The report ends an epoch; no event comes between it and the next epoch's first steps.
    phase = "train" if state.phase == "page" and state.step < (state.total_steps or 0) else state.phase
    words = [_PHASES.get(phase, phase)]
    if phase == "train" and state.total_steps:
        words.append(f"step {state.step} of {state.total_steps}")
    elif state.total > 1:
        words.append(f"{state.done} of {state.total}")
    if state.eta_seconds is not None and status.word in ("running", "paused"):
        words.append(f"about {format_seconds(state.eta_seconds)} left")
    return ", ".join(words)


def render(template: str, **values: object) -> str:
    """A part of a page, from one of the studio's templates."""
    return _environment().get_template(template).render(values).strip()


@functools.cache
def _environment() -> Environment:
    made = environment(Path(__file__).parent / "templates")
    made.globals |= {"words": WORDS, "tones": _TONES}
    made.filters |= {"progress": progress_words, "tags": tags_of}
    return made


def image_url(folder: Path, key: str, read: Callable[[], Image.Image], *, longest_px: int = THUMBNAIL_PX) -> str:
    """The address of an image's copy, which is made if it is not there yet.

    Args:
        folder: The folder that is served.
        key: The same for the same pixels alone.
        read: Gives the image; called only when there is no copy.
        longest_px: Limit of its longer edge.
    """
    digest = hashlib.sha256(f"{key} {longest_px}".encode("utf-8", errors="surrogateescape")).hexdigest()[:40]
    for suffix in ("png", "jpg"):
        if (folder / f"{digest}.{suffix}").is_file():
            return f"{ROUTE}/{digest}.{suffix}"
    image = read().convert("RGB")
    image.thumbnail((longest_px, longest_px), Image.Resampling.LANCZOS)
    # Without any of the file's own metadata.
    clean = Image.frombytes("RGB", image.size, image.tobytes())
    suffix = "png" if max(clean.size) <= CRISP_PX else "jpg"
    with atomic_path(folder / f"{digest}.{suffix}") as temporary:
        clean.save(temporary, format="PNG" if suffix == "png" else "JPEG", quality=88)
    return f"{ROUTE}/{digest}.{suffix}"


def file_url(folder: Path, image: Path, *, longest_px: int = THUMBNAIL_PX) -> str:
    """The address of an image file's copy in the folder that is served, with a limit of its longer edge.

    Raises:
        DataError: It cannot be read as an image.
    """
    facts = image.stat()
    key = f"{image.resolve()} {facts.st_mtime_ns} {facts.st_size}"
    return image_url(folder, key, lambda: load_image(image, "white"), longest_px=longest_px)


def img(url: str, alt: str) -> Attributes:
    """The attributes of an `<img>`."""
    return {"src": url, "alt": alt, "loading": "lazy", "class": "crisp" if url.endswith(".png") else None}


class LinkedAlbum(Album):
    """An album whose images are fetched from the studio instead of embedded; `run` is the same for that run alone."""

    def __init__(self, folder: Path, run: str) -> None:
        super().__init__()
        self._folder, self._run = folder, run

    def show(self, key: str, read: Callable[[], Image.Image], alt: str) -> Attributes:
        """The attributes of an image's `<img>`; `key` is the same for the same image of the run."""
        return img(image_url(self._folder, f"{self._run} {key}", read), alt)
