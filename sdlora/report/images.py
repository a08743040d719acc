"""Images inside the page: made small, embedded once each, and shown as often as wanted.

The page's script copies the source of an image that was embedded before; see `page.SCRIPT`.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image

LONGEST_PX = 384
_CRISP_PX = 128  # up to here an image is a sprite: kept exactly, and enlarged in squares
_JPEG_QUALITY = 85


@dataclass(frozen=True)
class _Embedded:
    identity: str
    attributes: str


class Album:
    """Writes `<img>` elements and remembers which images the page already holds."""

    def __init__(self) -> None:
        self._known: dict[str, _Embedded] = {}

    def show(self, key: str, read: Callable[[], Image.Image], alt: str) -> str:
        """An `<img>` of an image.

        Args:
            key: The same for the same image.
            read: Gives the image; called only when the page does not hold it yet.
            alt: What is seen, in words.
        """
        words = f"alt='{html.escape(alt, quote=True)}'"
        if (known := self._known.get(key)) is not None:
            return f"<img {words} {known.attributes} data-same='{known.identity}'>"
        image = read().convert("RGB")
        image.thumbnail((LONGEST_PX, LONGEST_PX), Image.Resampling.LANCZOS)
        crisp = " class='crisp'" if max(image.size) <= _CRISP_PX else ""
        attributes = f"width='{image.width}' height='{image.height}'{crisp}"
        made = _Embedded(f"picture-{len(self._known)}", attributes)
        self._known[key] = made
        return f"<img {words} {attributes} id='{made.identity}' src='{_data_url(image)}'>"


def _data_url(image: Image.Image) -> str:
    content = io.BytesIO()
    kind = "png" if max(image.size) <= _CRISP_PX else "jpeg"
    image.save(content, format=kind, optimize=True, **({} if kind == "png" else {"quality": _JPEG_QUALITY}))
    return f"data:image/{kind};base64,{base64.b64encode(content.getvalue()).decode('ascii')}"
