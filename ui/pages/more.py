"""All settings of a recipe beyond its decisions, under "More": made from the schema, in groups, each with its default.

What differs from its default is marked; the search field hides the rest in the browser.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import gradio as gr

from ..settings import form
from ..settings.form import Field
from ..settings.wording import help_in_words, in_a_word

_DECIDED = {"name", "data.folder", "data.exclude", "data.trigger", "base.path"}  # asked for elsewhere


def more_fields() -> list[Field]:
    """The fields under "More"."""
    return [field for field in form.fields() if field.name not in _DECIDED]


def more_settings() -> list[Any]:
    """Lay them out; returned in the order of `more_fields`."""
    gr.Textbox(
        label="Search the settings",
        placeholder="such as rank, captions or seed",
        max_lines=1,
        elem_id="search-settings",
    )
    controls, about = [], form.sections()
    for section, members in itertools.groupby(more_fields(), key=lambda field: field.section):
        title = form.TITLES[section]
        with gr.Accordion(title, open=False, elem_classes="settings-group"):
            gr.Markdown(f"{about[section]}.")
            with gr.Row(elem_classes="options"):
                controls += [_control(field) for field in members]
    return controls


def marks(changed: Iterable[str]) -> str:
    """The style that marks the controls of these options."""
    places = ", ".join(f"#{_element(name)}" for name in changed)
    return f'<style>{places} {{ --changed: "changed" }}</style>' if places else ""


def _element(name: str) -> str:
    return f"set-{name.replace('.', '-')}"


def _control(field: Field) -> gr.components.Component:
    info = f"{help_in_words(field.help)} Default: {in_a_word(field.default)}. ({field.name})"
    shared: dict[str, Any] = {"label": field.label, "info": info, "min_width": 260, "elem_id": _element(field.name)}
    if field.kind == "switch":
        return gr.Checkbox(**shared)
    if field.kind == "choice":
        return gr.Dropdown(list(field.choices), allow_custom_value=field.open, **shared)
    if field.kind == "choices" and field.open:
        return gr.Dropdown(list(field.choices), multiselect=True, allow_custom_value=True, **shared)
    if field.kind == "choices":
        return gr.CheckboxGroup(list(field.choices), **shared)
    # Numbers are text as well: a browser's field for numbers silently changes what it cannot read.
    return gr.Textbox(lines=2 if field.kind == "lines" else 1, max_lines=6 if field.kind == "lines" else 1, **shared)
