"""The pages of a run that trains: its progress with the queue, and the copy check.

Their contents come from the snapshot.
"""

from __future__ import annotations

from collections.abc import Callable

import gradio as gr

from .context import ANY_VALUE, Context, Live, need


def training_page(context: Context, live: Live) -> None:
    """Lay out the training page and connect its controls."""
    jobs, parts = context.jobs, live.parts
    parts["status"] = gr.HTML(elem_id="status")
    with gr.Row():
        parts["pause"] = pause = gr.Button("Pause", min_width=110, elem_id="pause", visible=False)
        parts["proceed"] = proceed = gr.Button("Continue", min_width=110, elem_id="continue", visible=False)
        parts["stop"] = stop = gr.Button("Stop and save", variant="stop", min_width=110, elem_id="stop", visible=False)
        parts["resume"] = resume = gr.Button(
            "Resume", variant="primary", min_width=110, elem_id="resume", visible=False
        )
    note = live.add_note("training-note")
    parts["grid"] = gr.HTML(elem_id="grid")
    parts["charts"] = gr.HTML(elem_id="charts")
    with gr.Accordion("Queue", open=False, elem_id="queue-box"):
        parts["queue"] = gr.HTML(elem_id="queue")
        with gr.Row(elem_classes="ends"):
            parts["waiting"] = waiting = gr.Dropdown(label="Waiting run", min_width=180, elem_id="waiting")
            earlier = gr.Button("Earlier", min_width=100, elem_id="earlier")
            later = gr.Button("Later", min_width=100, elem_id="later")
            cancel = gr.Button("Remove from the queue", min_width=160, elem_id="cancel")
    for button, action in ((pause, jobs.pause), (proceed, jobs.proceed), (stop, jobs.stop), (resume, jobs.resume)):
        _on_click(context, live, button, action, live.run, note)
    _on_click(context, live, earlier, lambda name: jobs.move(name, -1), waiting, note)
    _on_click(context, live, later, lambda name: jobs.move(name, 1), waiting, note)
    _on_click(context, live, cancel, jobs.cancel, waiting, note)


def copy_page(context: Context, live: Live) -> None:
    """Lay out the copy check's page and connect its controls."""
    parts = live.parts
    parts["banner"] = gr.HTML(elem_id="banner")
    with gr.Row(elem_classes="ends"):
        parts["epochs"] = gr.Radio([], label="Epoch", min_width=260, elem_id="copy-epoch")
        parts["copy-stop"] = stop = gr.Button(
            "Stop training here", variant="stop", min_width=160, elem_id="copy-stop", visible=False
        )
    note = live.add_note("copy-note")
    parts["pairs"], parts["signs"] = gr.HTML(elem_id="pairs"), gr.HTML(elem_id="signs")
    _on_click(context, live, stop, context.jobs.stop, live.run, note)


def _on_click(
    context: Context, live: Live, button: gr.Button, action: Callable[[str], str], target: gr.Dropdown, note: gr.HTML
) -> None:
    """Do something with the run that `target` names, and say what became of it."""
    clicked = button.click(lambda name: context.attempt(lambda: action(need(name))), target, note, **ANY_VALUE)
    live.events.append(clicked)
