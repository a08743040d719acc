"""The pages of what came out: the result with its epochs to try, and all runs."""

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
from .background_tasks import TaskPart, publish_part
from .context import Context, need

_STRIP = (0.0, 0.5, 1.0)


@dataclass(frozen=True)
class ResultPage:
    """The parts that are filled from a snapshot.

    Attributes:
        slots: By the snapshot's names.
        prompt: What to draw.
        epochs: The controls that choose an epoch: the one to draw with, and another.
        upload: Of the run, to the Hub.
    """

    slots: dict[str, gr.HTML]
    prompt: gr.Textbox
    epochs: list[gr.Dropdown]
    upload: TaskPart


@dataclass(frozen=True)
class RunsPage:
    """The parts that are filled from a snapshot, or lead to other pages.

    Attributes:
        slots: By the snapshot's names.
        other: The run that is compared with.
        clone: Takes a run's settings over into the recipe.
        note: What became of the last wish.
        moves: The clicks that change what there is to see.
    """

    slots: dict[str, gr.HTML]
    other: gr.Dropdown
    clone: gr.Button
    note: gr.HTML
    moves: list[Any]


def draw(context: Context, run: RunView, epochs: Sequence[int], wish: SampleRequest) -> str:
    """Draw a prompt with epochs at strengths, as HTML.

    Args:
        context: The studio.
        run: Whose files and base.
        epochs: Of each, an image for every strength.
        wish: What to draw.

    Raises:
        SdloraError: An epoch has no file, or cannot be drawn with.
    """
    if not wish.prompt.strip():
        raise ConfigError("There is no prompt. Write what to draw, with the trigger in it.")
    images: dict[str, Image.Image] = {}
    files: list[Path] = []
    for epoch in epochs:
        if epoch not in run.loras:
            raise StudioError(f"Epoch {epoch} has no file yet. Choose one that is complete.")
        files.append(run.loras[epoch])
        drawn = context.sampler.draw(run.config, files[-1], wish)
        images |= {
            f"epoch {epoch}, strength {strength:g}{' (the base)' if strength == 0 else ''}": image
            for strength, image in zip(wish.strengths, drawn, strict=True)
        }
    state = [(str(file), file.stat().st_mtime_ns) for file in files]
    key = hashlib.sha256(repr((run.key, state, wish)).encode()).hexdigest()
    return run_views.tried(context.studio.shown, images, key)


def result_page(context: Context, run: gr.Dropdown) -> ResultPage:
    """Lay the result's page out and say what its controls do."""
    result = gr.HTML(elem_id="result")
    gr.HTML(render("heading.html", title="Try it"))
    with gr.Row(elem_classes="ends"):
        prompt = gr.Textbox(label="Prompt", scale=3, min_width=260, elem_id="try-prompt")
        epoch = gr.Dropdown(label="Epoch", min_width=110, elem_id="try-epoch")
        seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**53, min_width=110, elem_id="try-seed")
    with gr.Row(elem_classes="ends"):
        strength = gr.Slider(0, 2, 1, step=0.05, label="Strength", min_width=260, elem_id="try-strength")
        one = gr.Button("Draw", variant="primary", min_width=110, elem_id="try")
        strip = gr.Button("Strip: 0, 0.5, 1", min_width=140, elem_id="try-strip")
    with gr.Row(elem_classes="ends"):
        other = gr.Dropdown(label="Compare with epoch", min_width=160, elem_id="try-other")
        both = gr.Button("Draw both epochs", min_width=140)
    tried = gr.HTML(elem_id="tried")

    def attempt(name: Any, epochs: Sequence[Any], words: str, number: Any, strengths: Sequence[float]) -> str:
        found = ""

        def drawn() -> str:
            nonlocal found
            view = read_run(context.studio, need(name))
            if view is None or any(one is None for one in epochs):
                raise StudioError("There is no epoch to draw with yet. Wait for the first one, and choose it.")
            chosen = [int(one) for one in epochs]
            found = draw(context, view, chosen, SampleRequest(words, int(number or 0), tuple(strengths)))
            return ""

        return context.attempt(drawn) or found

    one.click(lambda n, e, p, s, w: attempt(n, [e], p, s, [w]), [run, epoch, prompt, seed, strength], tried)
    strip.click(lambda n, e, p, s: attempt(n, [e], p, s, _STRIP), [run, epoch, prompt, seed], tried)
    both.click(
        lambda n, e, o, p, s, w: attempt(n, [e, o], p, s, [w]), [run, epoch, other, prompt, seed, strength], tried
    )
    with gr.Accordion("Publish", open=False, elem_id="publishing"):
        upload = publish_part(context, run)
    return ResultPage({"result": result}, prompt, [epoch, other], upload)


def runs_page(context: Context, run: gr.Dropdown) -> RunsPage:
    """Lay out the page of all runs and say what its controls do, but for clone, which leads to another page."""
    gr.HTML(render("quiet.html", words="The buttons act on the run chosen at the top of the page."))
    with gr.Row(elem_classes="ends"):
        other = gr.Dropdown(label="Compare its settings with", min_width=200, elem_id="compare-with")
        compare = gr.Button("Compare settings", min_width=200)
    with gr.Row():
        clone = gr.Button("Clone into the recipe", min_width=200, elem_id="clone")
        delete = gr.Button("Delete …", variant="stop", min_width=200, elem_id="delete")
    with gr.Row(visible=False) as sure:
        really = gr.Button("Delete it for good", variant="stop", elem_id="really-delete")
        keep = gr.Button("Keep it")
    note = gr.HTML(elem_id="runs-note")
    asked = gr.Textbox(visible=False)  # the chosen run may be another one by then
    cards = gr.HTML(elem_id="run-cards")

    def compared(first: Any, second: Any) -> str:
        try:
            one, two = (run_view.settings_of(context.studio, need(name)) for name in (first, second))
            return run_views.settings_table(first, second, run_view.differences(one, two))
        except SdloraError as error:
            return views.failure(error)

    def ask(name: Any) -> list[Any]:
        if not name:
            told = "No run is chosen. Choose one at the top of the page."
            return [views.message(told, "copying"), gr.update(visible=False), ""]
        told = f"{name!r} and everything in its folder will be gone: epochs, previews, LoRA files. Its images stay."
        return [views.message(told, "watch", title="Delete this run?"), gr.update(visible=True), name]

    def gone(name: Any) -> list[Any]:
        def action() -> str:
            context.jobs.forget(need(name))
            run_view.delete_run(context.studio, name)
            return f"{name!r} was deleted."

        return [context.attempt(action), gr.update(visible=False)]

    compare.click(compared, [run, other], note)
    delete.click(ask, run, [note, sure, asked])
    keep.click(lambda: ["", gr.update(visible=False)], None, [note, sure])
    moved = really.click(gone, asked, [note, sure])
    return RunsPage({"cards": cards}, other, clone, note, [moved])


def clone_into_draft(context: Context, name: Any) -> str:
    """Make a run's settings the recipe; returns what is told about it."""

    def action() -> str:
        draft = from_config(run_view.settings_of(context.studio, need(name)), context.studio)
        write_draft(context.studio, replace(draft, name=context.free_name(need(name))))
        return f"The settings of {name!r} are in the recipe now."

    return context.attempt(action)
