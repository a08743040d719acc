"""The pages of finished work: the result with its epochs to try, and all runs.

Their contents come from the snapshot.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from sdlora.errors import ConfigError, SdloraError

from ..html import views
from ..html.render import render
from ..settings.draft import from_config, write_draft
from ..state import run_view
from ..state.folders import StudioError
from ..state.run_view import RunView, read_run
from ..state.try_lora import SampleRequest
from .background_tasks import publish_controls
from .context import ANY_VALUE, Context, Live, failure, need

_STRIP = (0.0, 0.5, 1.0)


def draw(context: Context, run: RunView, epochs: Sequence[int], request: SampleRequest) -> str:
    """Draw a prompt with epochs of a run, with each at every strength of the request; the images as HTML.

    Raises:
        SdloraError: The prompt is empty, or an epoch has no file or cannot be drawn with.
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
    return views.tried(context.studio.shown, images, key)


def result_page(context: Context, live: Live) -> None:
    """Lay out the result's page and connect its controls."""
    parts, run = live.parts, live.run
    parts["result"] = gr.HTML(elem_id="result")
    gr.HTML(render("heading.html", title="Try it"))
    with gr.Row(elem_classes="ends"):
        parts["prompt"] = prompt = gr.Textbox(label="Prompt", scale=3, min_width=260, elem_id="try-prompt")
        parts["epoch"] = epoch = gr.Dropdown(label="Epoch", min_width=110, elem_id="try-epoch")
        seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**53, min_width=110, elem_id="try-seed")
    with gr.Row(elem_classes="ends"):
        strength = gr.Slider(
            0, 2, 1, step=0.05, label="Strength", min_width=260, elem_id="try-strength",
            info="Move it to see the prompt with the LoRA beside the base model.",
        )  # fmt: skip
        one = gr.Button("Draw", variant="primary", min_width=110, elem_id="try")
        strip = gr.Button("Draw at strengths 0, 0.5 and 1", min_width=140, elem_id="try-strip")
    with gr.Row(elem_classes="ends"):
        parts["other epoch"] = other = gr.Dropdown(label="Compare with epoch", min_width=160, elem_id="try-other")
        both = gr.Button("Draw both epochs", min_width=140)
    tried = gr.HTML(elem_id="tried")

    def draw_chosen(name: Any, text: str, number: Any, strengths: tuple[float, ...], epochs: Sequence[Any]) -> str:
        images = ""

        def action() -> None:
            nonlocal images
            view = read_run(context.studio, need(name))
            if view is None or any(epoch is None for epoch in epochs):
                raise StudioError("There is no epoch to draw with yet. Wait for the first one, and choose it.")
            images = draw(context, view, list(map(int, epochs)), SampleRequest(text, int(number or 0), strengths))

        return context.attempt(action) or images

    def draw_strip(name: Any, text: str, number: Any, first: Any) -> str:
        return draw_chosen(name, text, number, _STRIP, [first])

    def draw_at(name: Any, text: str, number: Any, at: float, *epochs: Any) -> str:
        return draw_chosen(name, text, number, (at,), epochs)

    def draw_beside_base(name: Any, text: str, number: Any, at: float, first: Any) -> str:
        return draw_chosen(name, text, number, (0.0, at) if at else (0.0,), [first])

    strength.release(draw_beside_base, [run, prompt, seed, strength, epoch], tried, **ANY_VALUE)
    one.click(draw_at, [run, prompt, seed, strength, epoch], tried, **ANY_VALUE)
    strip.click(draw_strip, [run, prompt, seed, epoch], tried, **ANY_VALUE)
    both.click(draw_at, [run, prompt, seed, strength, epoch, other], tried, **ANY_VALUE)
    with gr.Accordion("Publish", open=False, elem_id="publishing"):
        publish_controls(context, live)


def runs_page(context: Context, live: Live) -> tuple[gr.Button, gr.HTML]:
    """Lay out the page of all runs and connect its controls, except for clone, which leads to another page.

    Returns:
        The button that clones a run, and what became of the last click.
    """
    run = live.run
    gr.HTML(render("quiet.html", words="The buttons act on the run chosen at the top of the page."))
    with gr.Row(elem_classes="ends"):
        live.parts["other"] = other = gr.Dropdown(
            label="Compare its settings with", min_width=200, elem_id="compare-with"
        )
        compare = gr.Button("Compare settings", min_width=200)
    with gr.Row():
        clone = gr.Button("Clone into the recipe", min_width=200, elem_id="clone")
        delete = gr.Button("Delete …", variant="stop", min_width=200, elem_id="delete")
    with gr.Row(visible=False) as confirmation:
        confirm = gr.Button("Move it to the bin", variant="stop", elem_id="really-delete")
        cancel = gr.Button("Keep it")
    live.parts["restore"] = restore = gr.Button("Undo", visible=False, elem_id="restore-run")
    live.parts["deleted"] = last = gr.Textbox(visible=False)  # what that button puts back
    note = live.add_note("runs-note")
    asked = gr.Textbox(visible=False)  # the chosen run may be another one by then
    live.parts["cards"] = gr.HTML(elem_id="run-cards")

    def compare_settings(first: Any, second: Any) -> str:
        try:
            one, two = (run_view.settings_of(context.studio, need(name)) for name in (first, second))
            return views.settings_table(first, second, run_view.differences(one, two))
        except SdloraError as error:
            return failure(error)

    def ask(name: Any) -> list[Any]:
        if not name:
            message = views.message("No run is chosen. Choose one at the top of the page.", "copying")
            return [message, gr.update(visible=False), ""]
        text = (
            f"{name!r} goes to the bin with everything in its folder: epochs, previews, LoRA files. You can put it "
            "back for a month. The images that it was trained on stay."
        )
        return [views.message(text, "watch", title="Delete this run?"), gr.update(visible=True), name]

    def delete_run(name: Any) -> str:
        context.jobs.forget(need(name))
        run_view.delete_run(context.studio, name)
        return f"{name!r} was deleted."

    def put_back(key: str) -> str:
        return run_view.put_back(context.studio, key)

    compare.click(compare_settings, [run, other], note, **ANY_VALUE)
    delete.click(ask, run, [note, confirmation, asked], **ANY_VALUE)
    cancel.click(lambda: ["", gr.update(visible=False)], None, [note, confirmation])
    # What is confirmed is what is shown: another run is another question.
    live.run.input(
        lambda: ["", gr.update(visible=False)], None, [note, confirmation], show_progress="hidden", queue=False
    )
    deleted = confirm.click(
        lambda name: [context.attempt(delete_run, name), gr.update(visible=False)], asked, [note, confirmation]
    )
    restored = restore.click(lambda key: context.attempt(put_back, key), last, note)
    live.events.extend([deleted, restored])
    return clone, note


def clone_into_draft(context: Context, name: Any) -> str:
    """Make a run's settings the recipe; returns the message to show.

    Raises:
        SdloraError: No run is chosen, or its settings cannot be used.
    """
    draft = from_config(run_view.settings_of(context.studio, need(name)), context.studio)
    write_draft(context.studio, replace(draft, name=context.free_name(name)))
    return f"The settings of {name!r} are in the recipe now."
