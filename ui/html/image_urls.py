"""Images for the browser: decoded and encoded anew by sdlora, into the one folder that is served.

A file's name there is the hash of what it was made of, so that it never changes and can be kept for good.
"""

from __future__ import annotations

import hashlib
import html
import re
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from sdlora.common.files import atomic_path
from sdlora.data.images import load_image
from sdlora.report.images import Album

NAME = re.compile(r"[0-9a-f]{40}\.(png|jpg)")
ROUTE = "/studio/picture"
THUMBNAIL_PX, LARGE_PX = 320, 768
_CRISP_PX = 128  # up to here an image is a sprite: kept exactly, and enlarged in squares


def shown_url(folder: Path, image: Path, *, longest_px: int = THUMBNAIL_PX, background: str = "white") -> str:
    """The address of an image file's copy, which is made if it is not there yet.

    Args:
        folder: What is served.
        image: Any image that sdlora reads.
        longest_px: Its longer edge is made as short as this.
        background: Colour under transparent pixels.

    Raises:
        DataError: It cannot be read as an image.
    """
    facts = image.stat()
    key = f"{image.resolve()} {facts.st_mtime_ns} {facts.st_size} {longest_px} {background}"
    return _url(folder, key, lambda: load_image(image, background), longest_px)


def shown_image(folder: Path, key: str, read: Callable[[], Image.Image], *, longest_px: int = THUMBNAIL_PX) -> str:
    """The same for an image that is no file; `key` is the same for the same pixels alone."""
    return _url(folder, f"{key} {longest_px}", read, longest_px)


def _url(folder: Path, key: str, read: Callable[[], Image.Image], longest_px: int) -> str:
    digest = hashlib.sha256(key.encode("utf-8", errors="surrogateescape")).hexdigest()[:40]
    for suffix in ("png", "jpg"):
        if (folder / f"{digest}.{suffix}").is_file():
            return f"{ROUTE}/{digest}.{suffix}"
    image = read().convert("RGB")
    image.thumbnail((longest_px, longest_px), Image.Resampling.LANCZOS)
    # Without any of the file's own metadata.
    clean = Image.frombytes("RGB", image.size, image.tobytes())
    suffix = "png" if max(clean.size) <= _CRISP_PX else "jpg"
    with atomic_path(folder / f"{digest}.{suffix}") as temporary:
        clean.save(temporary, format="PNG" if suffix == "png" else "JPEG", quality=88)
    return f"{ROUTE}/{digest}.{suffix}"


class LinkedAlbum(Album):
    """Writes `<img>` elements whose images are fetched from the studio, instead of embedding them.

    Args:
        folder: What is served.
        run: The same for the same run alone.
    """

    def __init__(self, folder: Path, run: str) -> None:
        super().__init__()
        self._folder, self._run = folder, run

    def show(self, key: str, read: Callable[[], Image.Image], alt: str) -> str:
        """An `<img>` of an image; `key` is the same for the same image of the run."""
        url = shown_image(self._folder, f"{self._run} {key}", read)
        crisp = " class='crisp'" if url.endswith(".png") else ""
        return f"<img src='{url}' alt='{html.escape(alt, quote=True)}' loading='lazy'{crisp}>"
