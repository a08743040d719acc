"""The page of the recipe: a few decisions, all other options under "More", what the run will need, and its start.

Every change of a control sends that control alone and is made in the draft, one after the other; what changes with it
comes back, with the plan. A plan carries the fingerprint of the settings that it was made for. Start waits for changes
that are under way, sends all that the page shows, and is refused if the plan was made for anything else.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr

from sdlora.config.schema import RunConfig
from sdlora.config.toml import dump_toml, parse_config, read_config, renaming_notes, with_current_names
from sdlora.errors import ConfigError, SdloraError

from ..html import views
from ..html.render import render
from ..settings import estimate, form
from ..settings.bases import POCKET, check_base, describe_base, known_bases
from ..settings.draft import Draft, from_config, write_draft
from ..settings.recipes import LENGTHS, OWN, SUBJECTS
from ..settings.wording import in_a_word, in_words, labels
from ..state.locations import check_locations
from .context import ANY_VALUE, Context, Live, failure
from .more import marks, more_fields, more_settings

# An estimate takes seconds: one at a time, or an earlier one could arrive last. None is left out while another runs.
IN_TURN: dict[str, Any] = {
    "concurrency_id": "recipe", "concurrency_limit": 1, "trigger_mode": "multiple",
    "show_progress": "hidden", **ANY_VALUE,
}  # fmt: skip
_BASE = 3  # where the base model is among the controls
_NUM_DECISIONS = 5  # the controls before those under "More"; the name is the last of them
_STALE = "The plan on this page was made for other settings. It has been updated: check it, and press Start again."


# --- What the page shows ----------------------------------------------------------------------------------------------


def show(context: Context, draft: Draft) -> list[Any]:
    """The values of everything on the page for a draft: what it comes to, as `_outcome` gives it, and the controls."""
    return [*_outcome(context, draft), *fill(context, draft)]


def show_unplanned(context: Context, draft: Draft) -> list[Any]:
    """The same before it is known what the run needs, which takes seconds; `plan_after` adds that."""
    note, _ = _base_note(context, draft.base)
    waiting = render("quiet.html", words="Working out what this run needs …")
    outcome = [note, changes_html(draft), marks(draft.values), waiting, "", gr.update(interactive=False)]
    return [*outcome, *fill(context, draft)]


def plan_after(context: Context, event: Any, everything: list[Any]) -> None:
    """Show what the draft's run needs once an event has ended; `everything` are the components that `show` fills."""
    outcome = everything[: -num_controls()]
    event.then(
        lambda: _outcome(context, context.draft()), None, outcome,
        **{**IN_TURN, "show_progress": "minimal", "show_progress_on": outcome[3]},
    )  # fmt: skip


def show_again(context: Context, draft: Draft, values: Sequence[Any]) -> list[Any]:
    """The same without the controls that hold their values already, in which somebody may be typing by now.

    Args:
        context: The studio.
        draft: It is shown.
        values: What the controls hold, in the order of `fill`.
    """
    wanted = fill(context, draft)
    held = [new.get("value") if isinstance(new, dict) else new for new in wanted]
    controls = [gr.skip() if value == old else new for new, value, old in zip(wanted, held, values, strict=True)]
    return [*_outcome(context, draft), *controls]


def fill(context: Context, draft: Draft) -> list[Any]:
    """The values of all controls for a draft."""
    subject, length = draft.subject, draft.length
    decided = [
        gr.update(choices=[*SUBJECTS, *([OWN] if subject == OWN else [])], value=subject),
        draft.trigger,
        gr.update(choices=[*LENGTHS, *([OWN] if length == OWN else [])], value=length),
        draft.base,
        draft.name or proposed_name(context, draft),
    ]
    return [*decided, *(form.shown(field, draft.value(field.name)) for field in more_fields())]


def _outcome(context: Context, draft: Draft, base: str = "") -> list[Any]:
    """The note on the base model, what the recipe sets, marks, the plan, its fingerprint, and whether Start can be
    pressed, which a base model keeps it from that stands in its field and was refused.
    """
    plan, is_ready = plan_html(context, draft)
    note, is_base = _base_note(context, base or draft.base)
    is_ready = is_ready and is_base
    return [
        note,
        changes_html(draft),
        marks(draft.values),
        plan,
        fingerprint(draft) if is_ready else "",
        gr.update(value="Start training", interactive=is_ready),
    ]


def proposed_name(context: Context, draft: Draft) -> str:
    """An unused name for the next run; empty while there are no images."""
    return context.free_name(draft.run_name()) if draft.has_images else ""


def plan_html(context: Context, draft: Draft) -> tuple[str, bool]:
    """What a draft's run will do and need, or what is wrong with it; and whether it can be started."""
    if not draft.has_images:
        return views.message("Add images under Images first.", title="No images yet"), False
    try:
        config = draft.config(context.studio)
        sentences = [
            *estimate.describe_run(config),
            _trigger_in_words(draft),
            *estimate.describe_memory(draft.needs(), draft.fitted),
        ]
        return render("plan.html", sentences=map(in_words, sentences), warnings=_warnings(config)), True
    except SdloraError as error:
        return failure(error), False


def _trigger_in_words(draft: Draft) -> str:
    if draft.trigger:
        return f"The trigger word is “{draft.trigger}”."
    return "There is no trigger word: a style needs none, anything else does. It is asked for under Images."


def _warnings(config: RunConfig) -> list[str]:
    return [in_words(sentence) for sentence in estimate.warnings(config)]


def changes_html(draft: Draft) -> str:
    """Every option that is not at its default, by what has set it."""
    groups: dict[str, list[tuple[str, str]]] = {}
    for change in draft.changes():
        title = f"From {change.by}" if change.by == draft.preset else change.by.capitalize() or "Set by you"
        groups.setdefault(title, []).append((labels()[change.name].label, in_a_word(change.value)))
    return render("recipe.html", groups=groups)


def fingerprint(draft: Draft) -> str:
    """A digest of a draft but for the run's name, and its images; the same for what the page sends back."""
    values = [form.shown(f, form.entered(f, form.shown(f, draft.value(f.name)))) for f in more_fields()]
    settings = [draft.images, draft.subject, draft.length, draft.base, draft.trigger, *values]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    return f"{digest} {draft.images}"


def _base_note(context: Context, base: str) -> tuple[str, bool]:
    """What a base model is or why it cannot be one, and whether it can."""
    try:
        check_base(context.studio, base)
    except ConfigError as error:
        return failure(error), False
    return render("quiet.html", words=describe_base(base)), True


# --- What the page sends ----------------------------------------------------------------------------------------------


def read(context: Context, values: Sequence[Any], images: str | None = None) -> Draft:
    """The draft of all controls' values.

    Args:
        context: The studio.
        values: In the order of `fill`; the length follows from the other ones.
        images: The set of images; the draft's if None.

    Raises:
        ConfigError: A field cannot be parsed, or names what may not be read.
    """
    subject, trigger, _, base, name, *rest = values
    found = {field.name: form.entered(field, value) for field, value in zip(more_fields(), rest, strict=True)}
    found |= {"data.trigger": _text(trigger) or None, "base.path": _text(base) or POCKET}
    check_locations(context.studio, form.to_document(found))
    before = context.draft()
    images = before.images if images is None else images
    # What the page does not show stays as it is.
    hidden = {name: value for name, value in before.values.items() if name not in found}
    kept = replace(before, images=images, name=_text(name), values=hidden)
    return replace(kept, subject=subject if subject in SUBJECTS else OWN).with_values(found)


def change(context: Context, place: int, value: Any, images: str = "", base: Any = "") -> list[Any]:
    """Make one change in the draft; returns updates of everything that changes with it, in the order of `show`.

    Args:
        context: The studio.
        place: Which control was changed, in the order of `fill`.
        value: What it holds now.
        images: The set of images that the tab shows; empty if it shows none, which leaves the draft's.
        base: The base model that the tab shows; empty for the draft's.
    """
    before = context.draft()
    before = before.with_images(images) if images else before
    try:
        after = _changed(context, before, place, value)
    except SdloraError as error:
        refused = _refused(failure(error))
        # Beside its field as well.
        return [failure(error), *refused[1:]] if place == _BASE else refused
    write_draft(context.studio, after)
    controls = zip(fill(context, before), fill(context, after), strict=True)
    return [*_outcome(context, after, _text(base)), *(new if new != old else gr.skip() for old, new in controls)]


def _text(value: Any) -> str:
    return str(value or "").strip()


def _refused(message: str) -> list[Any]:
    """What the page shows where a change is refused: a message in place of the plan, and nothing to start."""
    return [*(gr.skip() for _ in range(3)), message, "", gr.update(interactive=False), *_untouched()]


def num_controls() -> int:
    """How many controls there are, which are the last of what `show` gives values for."""
    return _NUM_DECISIONS + len(more_fields())


def _untouched() -> list[Any]:
    return [gr.skip() for _ in range(num_controls())]


def _changed(context: Context, draft: Draft, place: int, value: Any) -> Draft:
    text = _text(value)
    if place == 0:
        return draft.with_answers(text if text in SUBJECTS else OWN, draft.length, draft.base)
    if place == 1:
        return draft.with_value("data.trigger", text or None)
    if place == 2:
        return draft.with_length(text if text in LENGTHS else OWN)
    if place == _BASE:
        return _with_base(context, draft, text or POCKET)
    if place == 4:
        return replace(draft, name=text)
    field = more_fields()[place - _NUM_DECISIONS]
    entered = form.entered(field, value)
    check_locations(context.studio, form.to_document({field.name: entered}))
    return draft.with_value(field.name, entered)


def _with_base(context: Context, draft: Draft, base: str) -> Draft:
    """The draft with another base model and its recipe."""
    if base == draft.base:
        return draft
    check_base(context.studio, base)
    return draft.with_answers(draft.subject, draft.length, base)


def start(context: Context, values: Sequence[Any], planned: Any) -> tuple[str, str | None, list[Any]]:
    """Start the run that the page shows, or put it into the queue.

    Args:
        context: The studio.
        values: Of all controls, in the order of `fill`.
        planned: The fingerprint that came with the plan beside them.

    Returns:
        The message to show; the run's name, None if it was refused; and what the page shows then.
    """
    name = None
    shown = [*(gr.skip() for _ in range(5)), gr.update(value="Start training", interactive=True), *_untouched()]

    def action() -> str:
        nonlocal name, shown
        images = str(planned).partition(" ")[2] if planned else None
        draft = read(context, values, images)
        config = draft.config(context.studio)
        if planned != fingerprint(draft) or values[2] != draft.length:
            write_draft(context.studio, draft)
            shown = show(context, draft)
            return _STALE
        message = context.jobs.add(config)
        # The next run needs another name.
        write_draft(context.studio, replace(draft, name=""))
        name, shown[5 + _NUM_DECISIONS] = config.name, ""
        return message

    message = context.attempt(action)
    return message, name, shown


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


# --- The page ---------------------------------------------------------------------------------------------------------


def recipe_page(
    context: Context, live: Live, tabs: gr.Tabs, images: gr.Textbox, trigger: gr.Textbox
) -> tuple[list[gr.components.Component], gr.HTML, gr.events.Dependency]:
    """Lay out the page and connect its controls; a start leads to the page of training.

    Args:
        context: The studio.
        live: What is kept up to date.
        tabs: The pages.
        images: The set of images that this tab shows.
        trigger: The trigger word, which is asked for on the page of images.

    Returns:
        The components that `show` gives values for, what became of the last click, and the event after which other
        images may be chosen.
    """
    with gr.Row(equal_height=False):
        with gr.Column(scale=3, min_width=280):
            decisions, base_note = _decisions(context, trigger)
            changes = gr.HTML(elem_id="recipe-changes")
        with gr.Column(scale=2, min_width=280):
            plan = gr.HTML(elem_id="plan")
            measure_button = gr.Button("Measure time and memory")
            begin = gr.Button("Start training", variant="primary", size="lg", elem_id="start")
            note = live.add_note("recipe-note")
    with gr.Accordion("More: all settings", open=False, elem_id="more"):
        controls = [*decisions, *more_settings()]
    with gr.Row():
        upload = gr.UploadButton("Load settings from a file (.toml)", file_types=[".toml"], min_width=220)
        with gr.Column(min_width=220):
            gr.HTML(render("settings_link.html"))
    marked, planned = gr.HTML(elem_id="marks"), gr.Textbox(visible=False)
    everything = [base_note, changes, marked, plan, planned, begin, *controls]
    # Identified by element id, because Gradio replaces the component object at every update.
    places = {control.elem_id: place for place, control in enumerate(controls)}

    def on_change(event: gr.EventData, shown: str, *values: Any) -> list[Any]:
        try:
            place = places[event.target.elem_id]  # type: ignore[union-attr]
            return change(context, place, values[place], shown, values[_BASE])
        except Exception as error:
            return _refused(context.unexpected(error))

    def measure(shown: str, *values: Any) -> str:
        try:
            config = read(context, values, shown or None).config(context.studio)
            measured = estimate.describe_measured(estimate.measure(dump_toml(config)))
            told = map(in_words, [*estimate.describe_run(config), *measured])
            return render("plan.html", sentences=told, warnings=_warnings(config))
        except SdloraError as error:
            return failure(error)

    def on_start(*values: Any) -> list[Any]:
        message, name, shown = start(context, values[:-1], values[-1])
        if name is None:
            return [message, gr.skip(), gr.skip(), *shown]
        return [message, gr.Tabs(selected="training"), gr.update(choices=context.jobs.names(), value=name), *shown]

    def load(file: str) -> list[Any]:
        message = context.attempt(load_settings, context, file)
        return [message, None, *show(context, context.draft())]

    # Texts once their editing has ended; a base model that is typed, too, which has no other event.
    settled = [control.blur if isinstance(control, gr.Textbox) else control.input for control in controls]
    gr.on(
        [*settled, decisions[3].blur], on_change, [images, *controls], everything,
        **{**IN_TURN, "show_progress": "minimal", "show_progress_on": plan},
    )  # fmt: skip
    measure_button.click(measure, [images, *controls], plan, **ANY_VALUE)
    # The first step waits in line behind changes that are under way; the second sends what the page then shows.
    waiting = begin.click(
        lambda: gr.update(value="Starting …", interactive=False), None, begin, **{**IN_TURN, "trigger_mode": "once"}
    )
    started = waiting.then(
        on_start, [*controls, planned], [note, tabs, live.run, *everything], show_progress="hidden", **ANY_VALUE
    )
    live.events.append(started)
    loaded = upload.upload(load, upload, [note, upload, *everything], **{**IN_TURN, "preprocess": True})
    return everything, note, loaded


def _decisions(context: Context, trigger: gr.Textbox) -> tuple[list[Any], gr.HTML]:
    """Lay out the decisions, in the order that `read` and `fill` use, with the note below the base model."""
    subject = gr.Radio(list(SUBJECTS), label="What should it learn?", elem_id="subject")
    length = gr.Radio(list(LENGTHS), label="How long?", elem_id="length")
    base = gr.Dropdown(
        known_bases(context.studio), label="Base model", allow_custom_value=True, elem_id="base",
        info="pocket is small and built in. Or enter a .safetensors checkpoint, a diffusers folder or a hub id such as "
        "owner/name. Models in the studio's folder 'bases' are in the list.",
    )  # fmt: skip
    base_note = gr.HTML(elem_id="base-note")
    name = gr.Textbox(label="Name of the run", max_lines=1, elem_id="name")
    return [subject, trigger, length, base, name], base_note
