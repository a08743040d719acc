"""The pages of a run that trains: its progress with the queue, and the copy check.

Their contents come from the snapshot.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gradio as gr

from .context import Context, need


@dataclass(frozen=True)
class TrainingPage:
    """The controls that are filled from a snapshot.

    Attributes:
        slots: By the snapshot's names.
        buttons: By the snapshot's names.
        waiting: The run of the queue that the buttons below it act on.
        events: Clicks after which the page is refreshed.
    """

    slots: dict[str, gr.HTML]
    buttons: dict[str, gr.Button]
    waiting: gr.Dropdown
    events: list[Any]


@dataclass(frozen=True)
class CopyPage:
    """The controls that are filled from a snapshot.

    Attributes:
        slots: By the snapshot's names.
        epoch: The epoch whose comparisons are shown.
        stop: Stops the run.
        events: Clicks after which the page is refreshed.
    """

    slots: dict[str, gr.HTML]
    epoch: gr.Radio
    stop: gr.Button
    events: list[Any]


def training_page(context: Context, run: gr.Dropdown) -> TrainingPage:
    """Lay out the training page and connect its controls."""
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
            cancel = gr.Button("Remove from the queue", min_width=160, elem_id="cancel")
    jobs = context.jobs

    def on_click(button: gr.Button, target: gr.Dropdown, action: Callable[[str], str]) -> Any:
        return button.click(lambda name: context.attempt(lambda: action(need(name))), target, note)

    events = [
        on_click(buttons["pause"], run, jobs.pause),
        on_click(buttons["proceed"], run, jobs.proceed),
        on_click(buttons["stop"], run, jobs.stop),
        on_click(buttons["resume"], run, jobs.resume),
        on_click(earlier, waiting, lambda name: jobs.move(name, -1)),
        on_click(later, waiting, lambda name: jobs.move(name, 1)),
        on_click(cancel, waiting, jobs.cancel),
    ]
    slots = {"status": status, "grid": grid, "charts": charts, "queue": queue}
    return TrainingPage(slots, buttons, waiting, events)


def copy_page(context: Context, run: gr.Dropdown) -> CopyPage:
    """Lay out the copy check's page and connect its controls."""
    banner = gr.HTML(elem_id="banner")
    with gr.Row(elem_classes="ends"):
        epoch = gr.Radio([], label="Epoch", min_width=260, elem_id="copy-epoch")
        stop = gr.Button("Stop training here", variant="stop", min_width=160, elem_id="copy-stop", visible=False)
    note = gr.HTML(elem_id="copy-note")
    pairs, signs = gr.HTML(elem_id="pairs"), gr.HTML(elem_id="signs")
    clicked = stop.click(lambda name: context.attempt(lambda: context.jobs.stop(need(name))), run, note)
    slots = {"banner": banner, "pairs": pairs, "signs": signs}
    return CopyPage(slots, epoch, stop, [clicked])
