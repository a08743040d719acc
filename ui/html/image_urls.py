"""Images for the browser: decoded and encoded again by sdlora, into the one folder that is served.

A file's name there is the hash of what it was made of, so that it never changes and can be cached for good.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from sdlora.common.files import atomic_path
from sdlora.data.images import load_image
from sdlora.report.html import Attributes
from sdlora.report.images import CRISP_PX, Album

NAME = re.compile(r"[0-9a-f]{40}\.(png|jpg)")
ROUTE = "/studio/picture"
THUMBNAIL_PX, LARGE_PX = 320, 768


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


def file_url(folder: Path, image: Path) -> str:
    """The address of an image file's copy in the folder that is served.

    Raises:
        DataError: It cannot be read as an image.
    """
    facts = image.stat()
    key = f"{image.resolve()} {facts.st_mtime_ns} {facts.st_size}"
    return image_url(folder, key, lambda: load_image(image, "white"))


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
