"""The pages of a run at work: training with its queue, and the copy check."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gradio as gr

from .context import Context, need


@dataclass(frozen=True)
class TrainingPage:
    """The parts that are filled from a snapshot.

    Attributes:
        slots: By the snapshot's names.
        buttons: By the snapshot's names.
        waiting: Which job of the queue is meant.
        moves: The clicks that change what there is to see.
    """

    slots: dict[str, gr.HTML]
    buttons: dict[str, gr.Button]
    waiting: gr.Dropdown
    moves: list[Any]


@dataclass(frozen=True)
class CopyPage:
    """The parts that are filled from a snapshot.

    Attributes:
        slots: By the snapshot's names.
        epoch: Which epoch's comparisons are shown.
        stop: Stops the run from here.
        moves: The clicks that change what there is to see.
    """

    slots: dict[str, gr.HTML]
    epoch: gr.Radio
    stop: gr.Button
    moves: list[Any]


def training_page(context: Context, run: gr.Dropdown) -> TrainingPage:
    """Lay the training page out and say what its controls do."""
    status = gr.HTML(elem_id="status")
    with gr.Row():
        buttons = {
            "pause": gr.Button("Pause", min_width=110, elem_id="pause", visible=False),
            "proceed": gr.Button("Continue", min_width=110, elem_id="continue", visible=False),
            "stop": gr.Button("Stop and save", variant="stop", min_width=110, elem_id="stop", visible=False),
            "resume": gr.Button("Resume", variant="primary", min_width=110, elem_id="resume", visible=False),
        }
    note = gr.HTML(elem_id="training-note")
    grid = gr.HTML(elem_id="grid")
    charts = gr.HTML(elem_id="charts")
    with gr.Accordion("Queue", open=False, elem_id="queue-box"):
        queue = gr.HTML(elem_id="queue")
        with gr.Row(elem_classes="ends"):
            waiting = gr.Dropdown(label="Waiting run", min_width=180, elem_id="waiting")
            earlier = gr.Button("Earlier", min_width=100, elem_id="earlier")
            later = gr.Button("Later", min_width=100, elem_id="later")
            cancel = gr.Button("Take out of the queue", min_width=160, elem_id="cancel")
    jobs = context.jobs
    moves = [
        buttons["pause"].click(lambda name: context.attempt(lambda: jobs.pause(need(name))), run, note),
        buttons["proceed"].click(lambda name: context.attempt(lambda: jobs.proceed(need(name))), run, note),
        buttons["stop"].click(lambda name: context.attempt(lambda: jobs.stop(need(name))), run, note),
        buttons["resume"].click(lambda name: context.attempt(lambda: jobs.resume(need(name))), run, note),
        earlier.click(lambda name: context.attempt(lambda: jobs.move(need(name), -1)), waiting, note),
        later.click(lambda name: context.attempt(lambda: jobs.move(need(name), 1)), waiting, note),
        cancel.click(lambda name: context.attempt(lambda: jobs.cancel(need(name))), waiting, note),
    ]
    slots = {"status": status, "grid": grid, "charts": charts, "queue": queue}
    return TrainingPage(slots, buttons, waiting, moves)


def copy_page(context: Context, run: gr.Dropdown) -> CopyPage:
    """Lay the copy check's page out."""
    banner = gr.HTML(elem_id="banner")
    with gr.Row(elem_classes="ends"):
        epoch = gr.Radio([], label="Epoch", min_width=260, elem_id="copy-epoch")
        stop = gr.Button("Stop training here", variant="stop", min_width=160, elem_id="copy-stop", visible=False)
    note = gr.HTML(elem_id="copy-note")
    pairs, signs = gr.HTML(elem_id="pairs"), gr.HTML(elem_id="signs")
    move = stop.click(lambda name: context.attempt(lambda: context.jobs.stop(need(name))), run, note)
    slots = {"banner": banner, "pairs": pairs, "signs": signs}
    return CopyPage(slots, epoch, stop, [move])
