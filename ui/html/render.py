"""The studio's own templates, beside those of the report, whose parts they use.

What a template gives is HTML with every value escaped; the pages hand it to Gradio as it is.
"""

from __future__ import annotations

import functools
from pathlib import Path

from jinja2 import Environment

from sdlora.report.html import environment

from . import words

_TEMPLATES = Path(__file__).parent / "templates"


@functools.cache
def _environment() -> Environment:
    made = environment(_TEMPLATES)
    made.filters |= {"tone": words.tone, "state_words": words.state_words, "progress": words.progress_words}
    return made


def render(template: str, **values: object) -> str:
    """A part of a page, from one of the studio's templates."""
    return _environment().get_template(template).render(values).strip()
