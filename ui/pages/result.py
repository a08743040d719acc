"""The pages of finished work: the result with its epochs to try, and all runs.

Their contents come from the snapshot.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from sdlora.errors import ConfigError, SdloraError

from ..html import run_views, views
from ..html.render import render
from ..settings.draft import from_config, write_draft
from ..state import run_view
from ..state.folders import StudioError
from ..state.run_view import RunView, read_run
from ..state.try_lora import SampleRequest
from .background_tasks import TaskControls, publish_controls
from .context import Context, need

_STRIP = (0.0, 0.5, 1.0)


@dataclass(frozen=True)
class ResultPage:
    """The controls that are filled from a snapshot.

    Attributes:
        slots: By the snapshot's names.
        prompt: The prompt to draw.
        epochs: The controls that choose an epoch: the one to draw with, and another.
        upload: Of the run, to the Hub.
    """

    slots: dict[str, gr.HTML]
    prompt: gr.Textbox
    epochs: list[gr.Dropdown]
    upload: TaskControls


@dataclass(frozen=True)
class RunsPage:
    """The controls that are filled from a snapshot, or lead to other pages.

    Attributes:
        slots: By the snapshot's names.
        other: The run that is compared with.
        clone: Makes a run's settings the recipe.
        note: What became of the last click.
        events: Clicks after which the page is refreshed.
    """

    slots: dict[str, gr.HTML]
    other: gr.Dropdown
    clone: gr.Button
    note: gr.HTML
    events: list[Any]


# --- Result -----------------------------------------------------------------------------------------------------------


def draw(context: Context, run: RunView, epochs: Sequence[int], request: SampleRequest) -> str:
    """Draw a prompt with epochs at strengths, as HTML.

    Args:
        context: The studio.
        run: Its files and base model are used.
        epochs: Of each, an image for every strength.
        request: What to draw.

    Raises:
        SdloraError: An epoch has no file, or cannot be drawn with.
    """
    if not request.prompt.strip():
        raise ConfigError("The prompt is empty. Describe an image, and include the trigger word.")
    images: dict[str, Image.Image] = {}
    files: list[Path] = []
    for epoch in epochs:
        if epoch not in run.loras:
            raise StudioError(f"Epoch {epoch} has no file yet. Choose one that is complete.")
        files.append(run.loras[epoch])
        drawn = context.sampler.draw(run.config, files[-1], request)
        images |= {
            f"epoch {epoch}, strength {strength:g}{' (the base)' if strength == 0 else ''}": image
            for strength, image in zip(request.strengths, drawn, strict=True)
        }
    state = [(str(file), file.stat().st_mtime_ns) for file in files]
    key = hashlib.sha256(repr((run.key, state, request)).encode()).hexdigest()
    return run_views.tried(context.studio.shown, images, key)


def result_page(context: Context, run: gr.Dropdown) -> ResultPage:
    """Lay out the result's page and connect its controls."""
    result = gr.HTML(elem_id="result")
    gr.HTML(render("heading.html", title="Try it"))
    with gr.Row(elem_classes="ends"):
        prompt = gr.Textbox(label="Prompt", scale=3, min_width=260, elem_id="try-prompt")
        epoch = gr.Dropdown(label="Epoch", min_width=110, elem_id="try-epoch")
        seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**53, min_width=110, elem_id="try-seed")
    with gr.Row(elem_classes="ends"):
        strength = gr.Slider(0, 2, 1, step=0.05, label="Strength", min_width=260, elem_id="try-strength")
        one = gr.Button("Draw", variant="primary", min_width=110, elem_id="try")
        strip = gr.Button("Draw at strengths 0, 0.5 and 1", min_width=140, elem_id="try-strip")
    with gr.Row(elem_classes="ends"):
        other = gr.Dropdown(label="Compare with epoch", min_width=160, elem_id="try-other")
        both = gr.Button("Draw both epochs", min_width=140)
    tried = gr.HTML(elem_id="tried")

    def draw_one(name: Any, text: str, number: Any, first: Any, at: float) -> str:
        return _draw_chosen(context, name, [first], SampleRequest(text, int(number or 0), (at,)))

    def draw_strip(name: Any, text: str, number: Any, first: Any) -> str:
        return _draw_chosen(context, name, [first], SampleRequest(text, int(number or 0), _STRIP))

    def draw_both(name: Any, text: str, number: Any, first: Any, second: Any, at: float) -> str:
        return _draw_chosen(context, name, [first, second], SampleRequest(text, int(number or 0), (at,)))

    one.click(draw_one, [run, prompt, seed, epoch, strength], tried)
    strip.click(draw_strip, [run, prompt, seed, epoch], tried)
    both.click(draw_both, [run, prompt, seed, epoch, other, strength], tried)
    with gr.Accordion("Publish", open=False, elem_id="publishing"):
        upload = publish_controls(context, run)
    return ResultPage({"result": result}, prompt, [epoch, other], upload)


def _draw_chosen(context: Context, name: Any, epochs: Sequence[Any], request: SampleRequest) -> str:
    """Draw with the epochs that are chosen; the images, or an error, as HTML."""
    images = ""

    def action() -> None:
        nonlocal images
        view = read_run(context.studio, need(name))
        if view is None or any(epoch is None for epoch in epochs):
            raise StudioError("There is no epoch to draw with yet. Wait for the first one, and choose it.")
        images = draw(context, view, [int(epoch) for epoch in epochs], request)

    return context.attempt(action) or images


# --- Runs -------------------------------------------------------------------------------------------------------------


def runs_page(context: Context, run: gr.Dropdown) -> RunsPage:
    """Lay out the page of all runs and connect its controls, except for clone, which leads to another page."""
    gr.HTML(render("quiet.html", words="The buttons act on the run chosen at the top of the page."))
    with gr.Row(elem_classes="ends"):
        other = gr.Dropdown(label="Compare its settings with", min_width=200, elem_id="compare-with")
        compare = gr.Button("Compare settings", min_width=200)
    with gr.Row():
        clone = gr.Button("Clone into the recipe", min_width=200, elem_id="clone")
        delete = gr.Button("Delete …", variant="stop", min_width=200, elem_id="delete")
    with gr.Row(visible=False) as confirmation:
        confirm = gr.Button("Delete permanently", variant="stop", elem_id="really-delete")
        cancel = gr.Button("Keep it")
    note = gr.HTML(elem_id="runs-note")
    asked = gr.Textbox(visible=False)  # the chosen run may be another one by then
    cards = gr.HTML(elem_id="run-cards")

    def ask(name: Any) -> list[Any]:
        if not name:
            message = views.message("No run is chosen. Choose one at the top of the page.", "copying")
            return [message, gr.update(visible=False), ""]
        text = f"{name!r} and everything in its folder is deleted: epochs, previews, LoRA files. Its images are kept."
        return [views.message(text, "watch", title="Delete this run?"), gr.update(visible=True), name]

    compare.click(lambda first, second: compare_settings(context, first, second), [run, other], note)
    delete.click(ask, run, [note, confirmation, asked])
    cancel.click(lambda: ["", gr.update(visible=False)], None, [note, confirmation])
    deleted = confirm.click(
        lambda name: [delete_run(context, name), gr.update(visible=False)], asked, [note, confirmation]
    )
    return RunsPage({"cards": cards}, other, clone, note, [deleted])


def compare_settings(context: Context, first: Any, second: Any) -> str:
    """The settings in which two runs differ, as HTML."""
    try:
        one, two = (run_view.settings_of(context.studio, need(name)) for name in (first, second))
        return run_views.settings_table(first, second, run_view.differences(one, two))
    except SdloraError as error:
        return views.failure(error)


def delete_run(context: Context, name: Any) -> str:
    """Delete a run; returns the message to show."""

    def action() -> str:
        context.jobs.forget(need(name))
        run_view.delete_run(context.studio, name)
        return f"{name!r} was deleted."

    return context.attempt(action)


def clone_into_draft(context: Context, name: Any) -> str:
    """Make a run's settings the recipe; returns the message to show."""

    def action() -> str:
        draft = from_config(run_view.settings_of(context.studio, need(name)), context.studio)
        write_draft(context.studio, replace(draft, name=context.free_name(need(name))))
        return f"The settings of {name!r} are in the recipe now."

    return context.attempt(action)
