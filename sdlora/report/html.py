"""HTML from the templates beside this module, with every value escaped.

Code hands in data and charts; the report, a batch's page and the studio are written by templates alone.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from sdlora.common.text import format_seconds

TEMPLATES = Path(__file__).parent / "templates"

Attributes = dict[str, object]
"""The attributes of an element, such as an `<img>`; those that are None are left out."""


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
