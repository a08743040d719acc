"""The page of the recipe: a few decisions, everything else under "More", the plan in words, and the start.

Every control under "More" is made from the schema.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gradio as gr

from sdlora.config.renamed import renaming_notes
from sdlora.config.toml import parse_config, read_config
from sdlora.errors import ConfigError, SdloraError

from ..html import views
from ..html.render import render
from ..settings import estimate, form
from ..settings.base_models import known_bases
from ..settings.draft import Draft, from_config, write_draft
from ..settings.form import Field
from ..settings.presets import LENGTHS, SUBJECTS
from .context import Context

# The plan takes seconds: answers come in the order of the wishes, so that none is followed by that to an earlier one.
IN_TURN: dict[str, Any] = {"concurrency_id": "recipe", "concurrency_limit": 1}
_DECIDED = {"name", "data.folder", "data.trigger", "base.path"}


@dataclass(frozen=True)
class RecipePage:
    """The parts of the page that others fill or wait for.

    Attributes:
        controls: What `fill` gives values for: the decisions, then every field under "More".
        name: The run's.
        plan: The plan in words.
        note: What became of the last wish.
        start: Starts the run.
    """

    controls: list[gr.components.Component]
    name: gr.Textbox
    plan: gr.HTML
    note: gr.HTML
    start: gr.Button


def more_fields() -> list[Field]:
    """The fields that stand under "More"."""
    return [field for field in form.fields() if field.name not in _DECIDED]


def fill(context: Context, draft: Draft) -> list[Any]:
    """The values of all controls for a draft."""
    name = draft.name or proposed_name(context, draft)
    decided = [draft.subject, draft.trigger, draft.base, draft.length, name]
    return [*decided, *(form.shown(field, draft.value(field.name)) for field in more_fields())]


def proposed_name(context: Context, draft: Draft) -> str:
    """A name for the next run that none has yet; empty while there are no images."""
    return context.free_name(draft.run_name()) if draft.has_images else ""


def read(context: Context, values: Sequence[Any]) -> Draft:
    """The draft that all controls say.

    Raises:
        ConfigError: A field cannot be read at all.
    """
    subject, trigger, base, length, name, *rest = values
    found = {field.name: form.entered(field, value) for field, value in zip(more_fields(), rest, strict=True)}
    found |= {"data.trigger": (trigger or "").strip() or None, "base.path": (base or "pocket").strip()}
    before = context.draft()
    kept = Draft(before.images, (name or "").strip(), subject, length, before.fitted, {})
    return kept.with_values(found)


def plan_html(context: Context, draft: Draft) -> str:
    """The plan of a draft, or what is wrong with it."""
    if not draft.has_images:
        return views.message("Add images first, under Images.", title="No plan yet")
    try:
        config = draft.config(context.studio)
        return views.plan_card([*estimate.describe_run(config), *estimate.describe_memory(draft)])
    except SdloraError as error:
        return views.failure(error)


def load_settings(context: Context, file: str) -> str:
    """Make the settings of an uploaded file the draft, and delete the file; returns the message to show."""

    def action() -> str:
        try:
            document, stem = read_config(file)
        finally:
            Path(file).unlink(missing_ok=True)
        draft = from_config(parse_config(document, name=stem), context.studio)
        draft.config(context.studio)
        write_draft(context.studio, replace(draft, name=context.free_name(draft.run_name())))
        return " ".join(["The settings were loaded; their images are chosen, too.", *renaming_notes(document)])

    return context.attempt(action)


def recipe_page(context: Context) -> RecipePage:
    """Lay the page out and say what its controls do, but for the start, which leads to another page."""
    with gr.Row(equal_height=False):
        with gr.Column(scale=3, min_width=280):
            subject = gr.Radio(list(SUBJECTS), label="What do you teach?", elem_id="subject")
            trigger = gr.Textbox(
                label="Trigger word", elem_id="trigger", max_lines=1,
                info="A word of your own that calls it up, such as zumi. Words that mean something already work less.",
            )  # fmt: skip
            length = gr.Radio(list(LENGTHS), label="How long?", elem_id="length")
            base = gr.Dropdown(
                known_bases(context.studio), label="Base model", allow_custom_value=True, elem_id="base",
                info="pocket is built in and small. Or name a .safetensors checkpoint, a diffusers folder or "
                "a hub id such as owner/name. What lies in the studio's folder 'bases' is in the list.",
            )  # fmt: skip
            name = gr.Textbox(label="Name of the run", max_lines=1, elem_id="name")
        with gr.Column(scale=2, min_width=280):
            planned = gr.HTML(elem_id="plan")
            measure = gr.Button("Measure time and memory")
            start = gr.Button("Start training", variant="primary", size="lg", elem_id="start")
            note = gr.HTML(elem_id="recipe-note")
    with gr.Accordion("More: every setting", open=False, elem_id="more"):
        controls = _more()
    with gr.Row():
        upload = gr.UploadButton("Load settings from a file (.toml)", file_types=[".toml"], min_width=220)
        with gr.Column(min_width=220):
            gr.HTML(render("settings_link.html"))
    decided: list[gr.components.Component] = [subject, trigger, base, length, name]
    everything = [*decided, *controls]
    page = RecipePage(everything, name, planned, note, start)

    def answer(*values: Any) -> list[Any]:
        try:
            draft = read(context, values).with_answers(values[0], values[3], (values[2] or "pocket").strip())
        except ConfigError as error:
            return [views.failure(error), *(gr.skip() for _ in controls)]
        write_draft(context.studio, draft)
        return [plan_html(context, draft), *fill(context, draft)[len(decided) :]]

    def keep(*values: Any) -> str:
        try:
            draft = read(context, values)
        except ConfigError as error:
            return views.failure(error)
        write_draft(context.studio, draft)
        return plan_html(context, draft)

    def measured(*values: Any) -> str:
        try:
            config = read(context, values).config(context.studio)
            measured = estimate.describe_measured(estimate.measure(config))
            return views.plan_card([*estimate.describe_run(config), *measured])
        except SdloraError as error:
            return views.failure(error)

    def load(file: str) -> list[Any]:
        told = load_settings(context, file)
        draft = context.draft()
        return [told, plan_html(context, draft), None, *fill(context, draft)]

    for radio in (subject, length):
        radio.input(answer, everything, [planned, *controls], show_progress="hidden", **IN_TURN)
    base.input(answer, everything, [planned, *controls], show_progress="hidden", **IN_TURN)
    settled = [_settled(control) for control in [trigger, name, *controls]]
    gr.on(settled, keep, everything, planned, show_progress="hidden", **IN_TURN)
    measure.click(measured, everything, planned)
    upload.upload(load, upload, [note, planned, upload, *everything], **IN_TURN)
    return page


def _settled(control: Any) -> Any:
    """The event that tells that a person is done with a control."""
    return control.blur if isinstance(control, (gr.Textbox, gr.Number)) else control.input


def _more() -> list[gr.components.Component]:
    controls: list[gr.components.Component] = []
    about = form.sections()
    by_section: dict[str, list[Field]] = {}
    for field in more_fields():
        by_section.setdefault(field.section, []).append(field)
    for section, members in by_section.items():
        with gr.Accordion(f"{section or 'run'}: {about[section]}", open=False), gr.Row():
            controls += [_control(field) for field in members]
    return controls


def _control(field: Field) -> gr.components.Component:
    told: dict[str, Any] = {"label": field.label, "info": f"{field.help} ({field.name})", "min_width": 260}
    if field.kind == "switch":
        return gr.Checkbox(**told)
    if field.kind == "choice":
        return gr.Dropdown(list(field.choices), **told)
    if field.kind == "choices":
        return gr.CheckboxGroup(list(field.choices), **told)
    if field.kind in ("whole", "number"):
        # The limits are the schema's to refuse: a browser would exchange a wrong number in silence.
        return gr.Number(precision=0 if field.kind == "whole" else None, **told)
    return gr.Textbox(lines=2 if field.kind == "lines" else 1, max_lines=6 if field.kind == "lines" else 1, **told)
