"""The studio's own templates, the words for how a run stands, and images that sdlora encodes again for the browser.

What a template gives is HTML with every value escaped; the pages hand it to Gradio as it is. An image's name in the
folder that is served is the hash of what it was made of, so that it never changes and can be cached for good.
"""

from __future__ import annotations

import functools
import hashlib
import re
import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

from jinja2 import Environment
from PIL import Image

from sdlora.common.files import atomic_path
from sdlora.common.text import format_seconds
from sdlora.copycheck.scale import PHASE as COMPARING
from sdlora.data.images import image_size, load_image
from sdlora.errors import DataError
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
    digest = _digest(key, longest_px)
    if (name := _copy(folder, digest)) is None:
        image = _small(read(), longest_px)
        name = f"{digest}.{_suffix(image.size)}"
        _write(image, folder / name)
    return f"{ROUTE}/{name}"


def file_url(folder: Path, image: Path, *, longest_px: int = THUMBNAIL_PX) -> str:
    """The address of an image file's copy in the folder that is served, with a limit of its longer edge.

    The copy is made once a browser asks for it; see `make_copy`.

    Raises:
        DataError: It is not an image.
    """
    facts = image.stat()
    digest = _digest(f"{image.resolve()} {facts.st_mtime_ns} {facts.st_size}", longest_px)
    if (name := _copy(folder, digest)) is None:
        name = f"{digest}.{_suffix(image_size(image))}"
        with _LOCK:
            _AWAITED[name] = image, longest_px
            if len(_AWAITED) > _MOST_AWAITED:
                _AWAITED.popitem(last=False)
    return f"{ROUTE}/{name}"


def make_copy(folder: Path, name: str) -> bool:
    """Make a copy whose address was given out by `file_url`; whether that could be done."""
    with _LOCK:
        image, longest_px = _AWAITED.get(name, (None, 0))
    try:
        if image is not None:
            _write(_small(load_image(image, "white"), longest_px), folder / name)
    except (DataError, FileNotFoundError):
        return False
    return image is not None


# Files whose copies no browser has asked for yet, and the limits of their edges, by the copies' names.
_AWAITED: OrderedDict[str, tuple[Path, int]] = OrderedDict()
_MOST_AWAITED = 20_000
_LOCK = threading.Lock()


def _digest(key: str, longest_px: int) -> str:
    return hashlib.sha256(f"{key} {longest_px}".encode("utf-8", errors="surrogateescape")).hexdigest()[:40]


def _copy(folder: Path, digest: str) -> str | None:
    return next((name for name in (f"{digest}.png", f"{digest}.jpg") if (folder / name).is_file()), None)


def _suffix(size: tuple[int, int]) -> str:
    return "png" if max(size) <= CRISP_PX else "jpg"


def _small(image: Image.Image, longest_px: int) -> Image.Image:
    image = image.convert("RGB")
    image.thumbnail((longest_px, longest_px), Image.Resampling.LANCZOS)
    # Without any of the file's own metadata.
    return Image.frombytes("RGB", image.size, image.tobytes())


def _write(image: Image.Image, file: Path) -> None:
    # A copy that a power cut takes is made again.
    with atomic_path(file, is_durable=False) as temporary:
        image.save(temporary, format="PNG" if file.suffix == ".png" else "JPEG", quality=88)


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
