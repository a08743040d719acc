"""Images inside a page: reduced, embedded once each, and shown as often as wanted.

The page's script copies the source of an image that was embedded before; see `templates/page.js`.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from sdlora.report.html import Attributes

LONGEST_PX = 384
CRISP_PX = 128  # up to here an image is a sprite: kept exactly, and enlarged in squares
_JPEG_QUALITY = 85


class Album:
    """Gives the attributes of `<img>` elements and remembers which images the page already holds."""

    def __init__(self) -> None:
        self._known: dict[str, Attributes] = {}

    def show(self, key: str, read: Callable[[], Image.Image], alt: str) -> Attributes:
        """The attributes of an image's `<img>`.

        Args:
            key: The same for the same image.
            read: Gives the image; called only when the page does not hold it yet.
            alt: What is seen, in words.
        """
        if (known := self._known.get(key)) is not None:
            return {"alt": alt, **known}
        image = read().convert("RGB")
        image.thumbnail((LONGEST_PX, LONGEST_PX), Image.Resampling.LANCZOS)
        crisp = "crisp" if max(image.size) <= CRISP_PX else None
        shape: Attributes = {"width": image.width, "height": image.height, "class": crisp}
        identity = f"picture-{len(self._known)}"
        self._known[key] = {**shape, "data-same": identity}
        return {"alt": alt, **shape, "id": identity, "src": _encoded(image)}


def read_image(file: Path) -> Image.Image:
    """An image with its pixels in memory, its file closed."""
    with Image.open(file) as image:
        image.load()
        return image


def data_url(kind: str, content: bytes) -> str:
    """An image file of a kind, such as "png", as an address that holds all of it."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"


def _encoded(image: Image.Image) -> str:
    content = io.BytesIO()
    kind = "png" if max(image.size) <= CRISP_PX else "jpeg"
    image.save(content, format=kind, optimize=True, **({} if kind == "png" else {"quality": _JPEG_QUALITY}))
    return data_url(kind, content.getvalue())
