"""All pages of the studio together: how one leads to the next, and how they are kept up to date.

Every page asks for a snapshot every two seconds and updates only what has changed.
"""

from __future__ import annotations

import hashlib
import json
import traceback
from dataclasses import replace
from typing import Any

import gradio as gr

from ..html import views
from ..html.render import render
from ..settings.draft import update_draft, write_draft
from ..state.background_tasks import Kind
from . import images as images_tab
from . import recipe as recipe_form
from .background_tasks import TaskControls
from .context import Context
from .images import images_page
from .recipe import recipe_page
from .result import clone_into_draft, result_page, runs_page
from .snapshot import SLOTS, snapshot
from .training import copy_page, training_page

EVERY_SECONDS = 2
HEAD = (
    "<link rel='stylesheet' href='/studio/studio.css'><script src='/studio/studio.js' defer></script>"
    "<meta name='viewport' content='width=device-width, initial-scale=1'>"
)


def theme() -> gr.themes.Base:
    """Quiet colours and the system's fonts, so that none is downloaded."""
    base = gr.themes.Base(
        primary_hue="blue", neutral_hue="zinc", radius_size="sm", spacing_size="sm",
        font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"],
    )  # fmt: skip
    # All of these pairs have a contrast of 4.5 or more, so that help can be read.
    return base.set(
        block_info_text_color="*neutral_600", block_info_text_color_dark="*neutral_300",
        block_label_text_color="*neutral_700", block_label_text_color_dark="*neutral_200",
        block_title_text_color="*neutral_800", block_title_text_color_dark="*neutral_100",
        body_text_color_subdued="*neutral_600", body_text_color_subdued_dark="*neutral_300",
        button_primary_background_fill="*primary_700", button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover="*primary_800", button_primary_background_fill_hover_dark="*primary_600",
        button_primary_text_color="white", input_placeholder_color="*neutral_600",
        input_placeholder_color_dark="*neutral_300", input_background_fill="white", input_border_width="1px",
        input_border_color="*neutral_400", input_border_color_dark="*neutral_500",
        input_background_fill_dark="*neutral_900", body_background_fill="#fafafa",
    )  # fmt: skip


def build(context: Context) -> Any:
    """All pages, as Gradio's Blocks.

    Args:
        context: The studio behind them.
    """
    return _App(context).blocks


class _App:
    """The pages, and the handlers that concern more than one of them.

    Args:
        context: The studio behind them.
    """

    def __init__(self, context: Context) -> None:
        self._context = context
        with gr.Blocks(
            title="sdlora studio", analytics_enabled=False, delete_cache=(3600, 3600), fill_width=True
        ) as self.blocks:
            self._lay_out()
            self._connect()

    def _lay_out(self) -> None:
        context = self._context
        with gr.Row(elem_id="top"):
            with gr.Column(scale=3, min_width=240):
                gr.HTML(render("brand.html"))
                strip = gr.HTML(elem_id="strip")
            self._run = run = gr.Dropdown(label="Run", min_width=180, scale=1, elem_id="run")
        with gr.Tabs(elem_id="steps") as self._tabs:
            with gr.Tab("Images", id="pictures"):
                self._images = images_page(context)
            with gr.Tab("Recipe", id="recipe") as self._recipe_tab:
                self._recipe = recipe_page(context)
            with gr.Tab("Training", id="training"):
                self._training = training_page(context, run)
            with gr.Tab("Copy check", id="copy"):
                self._copy = copy_page(context, run)
            with gr.Tab("Result", id="result"):
                self._result = result_page(context, run)
            with gr.Tab("Runs", id="runs"):
                self._runs = runs_page(context, run)
        self._tasks: dict[Kind, TaskControls] = {"caption": self._images.captions, "publish": self._result.upload}
        # What this page shows already, by part. A gr.State would cost every tab a connection that stays open, and a
        # browser has six of them for all its tabs.
        seen = gr.Textbox("{}", visible=False)
        slots = {"strip": strip, **self._training.slots, **self._copy.slots, **self._result.slots, **self._runs.slots}
        slots |= {kind: task.status for kind, task in self._tasks.items()}
        self._inputs = [run, self._copy.epoch, seen]
        self._outputs = [
            *(slots[slot] for slot in SLOTS), run, self._copy.epoch, self._copy.stop, self._training.waiting,
            self._result.prompt, *self._result.epochs, self._runs.other, *self._training.buttons.values(),
            *(task.end for task in self._tasks.values()), seen,
        ]  # fmt: skip

    def _connect(self) -> None:
        images, recipe, runs = self._images, self._recipe, self._runs
        draft = [images.choice, *images.parts, *recipe.controls, recipe.plan, recipe.note]
        self.blocks.load(self.show_draft, None, draft, show_progress="hidden", queue=False)
        for refreshes in (self.blocks.load, gr.Timer(EVERY_SECONDS).tick, self._run.input, self._copy.epoch.input):
            refreshes(self.refresh, self._inputs, self._outputs, show_progress="hidden", queue=False)
        images.next.click(lambda: gr.Tabs(selected="recipe"), None, self._tabs, show_progress="hidden")
        self._recipe_tab.select(
            self.update_recipe, recipe.name, [recipe.name, recipe.plan], show_progress="hidden", **recipe_form.IN_TURN
        )
        started = recipe.start.click(
            self.start, recipe.controls, [recipe.note, self._tabs, self._run, recipe.name], show_progress="hidden"
        )
        runs.clone.click(self.clone, self._run, [runs.note, self._tabs, *draft], show_progress="hidden")
        events = [started, *self._training.events, *self._copy.events, *runs.events]
        for event in (*events, *(event for task in self._tasks.values() for event in task.events)):
            event.then(self.refresh, self._inputs, self._outputs, show_progress="hidden", queue=False)

    def refresh(self, name: str | None, epoch: Any, known: str) -> list[Any]:
        """The updates of all that a page shows of the chosen run; an unexpected error is shown on top."""
        try:
            return self._updates(name, epoch, json.loads(known or "{}"))
        except Exception as error:
            # The rest stays as it is; the next refresh, two seconds from now, may succeed.
            self._context.log(traceback.format_exc())
            return [views.failure(self._context.unexpected(error)), *(gr.skip() for _ in self._outputs[1:])]

    def _updates(self, name: str | None, epoch: Any, before: dict[str, str]) -> list[Any]:
        if name not in self._context.jobs.names():
            name = self._context.default_run()
        # A chosen epoch means nothing in another run, and a page that shows the last epoch follows it.
        same = before.get("name") == name and str(epoch) != before.get("last")
        chosen = int(epoch) if same and epoch is not None else None
        now = snapshot(self._context, name, chosen)
        last = max(now.epochs, default=None)
        change = _Changes(before)
        change.seen |= {"name": name or "", "last": str(last)}
        loras = (name, now.loras, now.kept)
        other = next((epoch for epoch in reversed(now.loras) if epoch != now.kept), now.kept)
        return [
            *(change(slot, value=now.html[slot]) for slot in SLOTS),
            change("run", choices=now.names, value=name),
            change(
                "epochs", (name, now.epochs),
                choices=[(str(epoch or "base"), epoch) for epoch in now.epochs],
                value=chosen if chosen in now.epochs else last,
            ),
            change("copy-stop", visible=now.can["stop"]),
            change("waiting", choices=now.waiting, value=next(iter(now.waiting), None)),
            change("prompt", placeholder=now.prompt),
            change("epoch", loras, choices=now.loras, value=now.kept),
            change("other epoch", loras, choices=now.loras, value=other),
            change("other", choices=now.names),
            *(change(action, visible=now.can[action]) for action in self._training.buttons),
            *(
                change(f"end {kind}", value=now.ends[kind] or "", visible=now.ends[kind] is not None)
                for kind in self._tasks
            ),
            json.dumps(change.seen),
        ]  # fmt: skip

    def show_draft(self) -> list[Any]:
        """The images and the recipe as they were last edited."""
        context = self._context
        notes = update_draft(context.studio)
        draft = context.draft()
        return [
            gr.update(choices=context.sets(), value=draft.images or None),
            *images_tab.show(context, draft),
            *recipe_form.fill(context, draft),
            recipe_form.plan_html(context, draft),
            views.message(" ".join(notes), "busy") if notes else "",
        ]

    def update_recipe(self, name: str) -> list[Any]:
        """The parts of the recipe that depend on the images; the others stay as they are being edited."""
        draft = self._context.draft()
        proposed = gr.skip() if name else recipe_form.proposed_name(self._context, draft)
        return [proposed, recipe_form.plan_html(self._context, draft)]

    def start(self, *values: Any) -> list[Any]:
        """Start the recipe's run, or put it into the queue, and lead to its training page."""
        context, name = self._context, None

        def action() -> str:
            nonlocal name
            draft = recipe_form.read(context, values)
            config = draft.config(context.studio)
            message = context.jobs.add(config)
            write_draft(context.studio, replace(draft, name=""))
            name = config.name
            return message

        message = context.attempt(action)
        if name is None:
            return [message, gr.skip(), gr.skip(), gr.skip()]
        # The next run needs another name.
        return [message, gr.Tabs(selected="training"), gr.update(choices=context.jobs.names(), value=name), ""]

    def clone(self, name: Any) -> list[Any]:
        """Make a run's settings the recipe, and lead to it."""
        message = clone_into_draft(self._context, name)
        return [message, gr.Tabs(selected="recipe"), *self.show_draft()]


class _Changes:
    """The updates of a page that differ from what it shows already.

    Args:
        before: A digest for every part of the page, as it is shown.
    """

    def __init__(self, before: dict[str, str]) -> None:
        self._before = before
        self.seen: dict[str, str] = {}

    def __call__(self, part: str, key: Any = None, **update: Any) -> Any:
        """The update of a part, or none if it has not changed; `key`, if given, is compared instead of the update."""
        self.seen[part] = hashlib.sha256(repr(update if key is None else key).encode()).hexdigest()[:16]
        return gr.skip() if self._before.get(part) == self.seen[part] else gr.update(**update)
