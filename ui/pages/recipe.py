"""The page of the recipe: a few decisions, all other options under "More", what the run will need, and its start.

Every control under "More" is made from the schema.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr

from sdlora.config.toml import dump_toml, parse_config, read_config, renaming_notes, with_current_names
from sdlora.errors import ConfigError, SdloraError

from ..html import views
from ..html.render import render
from ..settings import estimate, form
from ..settings.draft import LENGTHS, SUBJECTS, Draft, from_config, write_draft
from ..settings.form import Field
from ..state.locations import check_locations
from .context import Context

# An estimate takes seconds: one at a time, or an earlier one could arrive last.
IN_TURN: dict[str, Any] = {"concurrency_id": "recipe", "concurrency_limit": 1}
NAME = 4  # where the run's name is among the decisions
_DECIDED = {"name", "data.folder", "data.trigger", "base.path"}


def more_fields() -> list[Field]:
    """The fields under "More"."""
    return [field for field in form.fields() if field.name not in _DECIDED]


def fill(context: Context, draft: Draft) -> list[Any]:
    """The values of all controls for a draft."""
    name = draft.name or proposed_name(context, draft)
    decided = [draft.subject, draft.trigger, draft.base, draft.length, name]
    return [*decided, *(form.shown(field, draft.value(field.name)) for field in more_fields())]


def proposed_name(context: Context, draft: Draft) -> str:
    """An unused name for the next run; empty while there are no images."""
    return context.free_name(draft.run_name()) if draft.has_images else ""


def read(context: Context, values: Sequence[Any]) -> Draft:
    """The draft of the controls' values.

    Raises:
        ConfigError: A field cannot be parsed, or names what may not be read.
    """
    subject, trigger, base, length, name, *rest = values
    found = {field.name: form.entered(field, value) for field, value in zip(more_fields(), rest, strict=True)}
    found |= {"data.trigger": (trigger or "").strip() or None, "base.path": (base or "pocket").strip()}
    before = context.draft()
    check_locations(context.studio, form.to_document(found))
    kept = Draft(before.images, (name or "").strip(), subject, length, before.fitted, {})
    return kept.with_values(found)


def plan_html(context: Context, draft: Draft) -> str:
    """What a draft's run will do and need, or what is wrong with it."""
    if not draft.has_images:
        return views.message("Add images under Images first.", title="No images yet")
    try:
        config = draft.config(context.studio)
        needed = estimate.describe_memory(draft.needs(), draft.fitted)
        return render("plan.html", sentences=[*estimate.describe_run(config), *needed])
    except SdloraError as error:
        return views.failure(error)


def load_settings(context: Context, file: str) -> str:
    """Make the settings of an uploaded file the draft, and delete the file; returns the message to show.

    Raises:
        SdloraError: They are not valid, or their images may not be read.
    """
    try:
        document, stem = read_config(file, alone=True)
    finally:
        Path(file).unlink(missing_ok=True)
    check_locations(context.studio, with_current_names(document))
    draft = from_config(parse_config(document, name=stem), context.studio)
    draft.config(context.studio)
    write_draft(context.studio, replace(draft, name=context.free_name(draft.run_name())))
    return " ".join(["The settings were loaded, and their images are chosen.", *renaming_notes(document)])


def recipe_page(context: Context) -> tuple[list[gr.components.Component], gr.HTML, gr.HTML, gr.Button]:
    """Lay out the page and connect its controls, except for the start, which leads to another page.

    Returns:
        The components that `fill` gives values for; what the run will do and need; what became of the last click; and
        the button that starts the run.
    """
    with gr.Row(equal_height=False):
        with gr.Column(scale=3, min_width=280):
            decisions = _decisions(context)
        with gr.Column(scale=2, min_width=280):
            plan_box = gr.HTML(elem_id="plan")
            measure_button = gr.Button("Measure time and memory")
            start = gr.Button("Start training", variant="primary", size="lg", elem_id="start")
            note = gr.HTML(elem_id="recipe-note")
    with gr.Accordion("More: all settings", open=False, elem_id="more"):
        more = _more()
    with gr.Row():
        upload = gr.UploadButton("Load settings from a file (.toml)", file_types=[".toml"], min_width=220)
        with gr.Column(min_width=220):
            gr.HTML(render("settings_link.html"))
    everything = [*decisions, *more]
    subject, trigger, base, length, name = decisions

    def apply_presets(*values: Any) -> list[Any]:
        try:
            draft = read(context, values).with_answers(values[0], values[3], (values[2] or "pocket").strip())
        except ConfigError as error:
            return [views.failure(error), *(gr.skip() for _ in more)]
        write_draft(context.studio, draft)
        return [plan_html(context, draft), *fill(context, draft)[len(decisions) :]]

    def keep(*values: Any) -> str:
        try:
            draft = read(context, values)
        except ConfigError as error:
            return views.failure(error)
        write_draft(context.studio, draft)
        return plan_html(context, draft)

    def measure(*values: Any) -> str:
        try:
            config = read(context, values).config(context.studio)
            measured = estimate.describe_measured(estimate.measure(dump_toml(config)))
            return render("plan.html", sentences=[*estimate.describe_run(config), *measured])
        except SdloraError as error:
            return views.failure(error)

    def load(file: str) -> list[Any]:
        message = context.attempt(load_settings, context, file)
        draft = context.draft()
        return [message, plan_html(context, draft), None, *fill(context, draft)]

    for choice in (subject, length, base):
        choice.input(apply_presets, everything, [plan_box, *more], show_progress="hidden", **IN_TURN)
    # Once the editing of a control has ended.
    settled = [
        control.blur if isinstance(control, (gr.Textbox, gr.Number)) else control.input
        for control in (trigger, name, *more)
    ]
    gr.on(settled, keep, everything, plan_box, show_progress="hidden", **IN_TURN)
    measure_button.click(measure, everything, plan_box)
    upload.upload(load, upload, [note, plan_box, upload, *everything], **IN_TURN)
    return everything, plan_box, note, start


def _decisions(context: Context) -> list[Any]:
    """Lay out the decisions; returned in the order that `read` and `fill` use."""
    subject = gr.Radio(list(SUBJECTS), label="What should it learn?", elem_id="subject")
    trigger = gr.Textbox(
        label="Trigger word", elem_id="trigger", max_lines=1,
        info="An invented word for it, such as zumi. Words with a meaning work less well.",
    )  # fmt: skip
    length = gr.Radio(list(LENGTHS), label="How long?", elem_id="length")
    base = gr.Dropdown(
        estimate.known_bases(context.studio), label="Base model", allow_custom_value=True, elem_id="base",
        info="pocket is small and built in. Or enter a .safetensors checkpoint, a diffusers folder or a hub id such as "
        "owner/name. Models in the studio's folder 'bases' are in the list.",
    )  # fmt: skip
    name = gr.Textbox(label="Name of the run", max_lines=1, elem_id="name")
    return [subject, trigger, base, length, name]


def _more() -> list[Any]:
    controls = []
    about = form.sections()
    for section, members in itertools.groupby(more_fields(), key=lambda field: field.section):
        with gr.Accordion(f"{section or 'run'}: {about[section]}", open=False), gr.Row():
            controls += [_control(field) for field in members]
    return controls


def _control(field: Field) -> gr.components.Component:
    shared: dict[str, Any] = {"label": field.label, "info": f"{field.help} ({field.name})", "min_width": 260}
    if field.kind == "switch":
        return gr.Checkbox(**shared)
    if field.kind == "choice":
        return gr.Dropdown(list(field.choices), **shared)
    if field.kind == "choices":
        return gr.CheckboxGroup(list(field.choices), **shared)
    if field.kind in ("whole", "number"):
        # No limits here: a browser would silently replace a number outside of them, while the schema explains them.
        return gr.Number(precision=0 if field.kind == "whole" else None, **shared)
    return gr.Textbox(lines=2 if field.kind == "lines" else 1, max_lines=6 if field.kind == "lines" else 1, **shared)
