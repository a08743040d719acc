"""HTML from the templates beside this module, with every value escaped, and images embedded in it once each.

Code hands in data and charts; the report, a batch's page and the studio are written by templates alone. The page's
script copies the source of an image that was embedded before; see `templates/page.js`.
"""

from __future__ import annotations

import base64
import functools
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from sdlora.common.text import format_seconds

TEMPLATES = Path(__file__).parent / "templates"

Attributes = dict[str, object]
"""The attributes of an element, such as an `<img>`; those that are None are left out."""

LONGEST_PX = 384
CRISP_PX = 128  # up to here an image is a sprite: kept exactly, and enlarged in squares
_JPEG_QUALITY = 85


@dataclass(frozen=True)
class Figure:
    """A chart under its title, with a note and perhaps a small image below."""

    title: str
    chart: Markup
    note: str
    image: Attributes | None = None


@dataclass(frozen=True)
class Table:
    """A table of plain text, which scrolls sideways inside its own box."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@functools.cache
def environment(*folders: Path) -> Environment:
    """The templates of some folders and of the report; a value that a template misses is an error."""
    made = Environment(
        loader=FileSystemLoader([*folders, TEMPLATES]), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    made.filters |= {"epoch_name": epoch_name, "one_in": one_in, "duration": format_seconds}
    return made


def render(template: str, **values: object) -> str:
    """A page from one of the report's templates, ending in a line feed."""
    return environment().get_template(template).render(values) + "\n"


def epoch_name(epoch: int) -> str:
    """The name of an epoch in a heading: "base" or "epoch 2"."""
    return f"epoch {epoch}" if epoch else "base"


def one_in(probability: float) -> str:
    """The beginning of a sentence on a share of many: "About 1 in 370", or "Most" above two thirds."""
    return "Most" if probability > 2 / 3 else f"About 1 in {round(1 / max(probability, 1e-9)):,}"


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
