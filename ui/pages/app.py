"""The studio's pages put together: what leads from one to the next, and what is kept up to date.

Every page asks for a snapshot each two seconds and changes only what is not as it was.
"""

from __future__ import annotations

import hashlib
import json
import traceback
from dataclasses import replace
from typing import Any

import gradio as gr

from ..html import views
from ..settings.draft import update_draft, write_draft
from ..state.background_tasks import Kind
from . import images as images_tab
from . import recipe as recipe_form
from .background_tasks import TaskPart
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
    """Quiet colours and the system's own fonts, so that none is fetched."""
    base = gr.themes.Base(
        primary_hue="blue", neutral_hue="zinc", radius_size="sm", spacing_size="sm",
        font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"],
    )  # fmt: skip
    # Help that cannot be read is none: these pairs have a contrast of 4.5 and more.
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
    with gr.Blocks(
        title="sdlora studio", analytics_enabled=False, delete_cache=(3600, 3600), fill_width=True
    ) as blocks:
        with gr.Row(elem_id="top"):
            with gr.Column(scale=3, min_width=240):
                gr.HTML("<h1 class='brand'>sdlora studio</h1>")
                strip = gr.HTML(elem_id="strip")
            run = gr.Dropdown(label="Run", min_width=180, scale=1, elem_id="run")
        with gr.Tabs(elem_id="steps") as tabs:
            with gr.Tab("Pictures", id="pictures"):
                images = images_page(context)
            with gr.Tab("Recipe", id="recipe") as recipe_tab:
                recipe = recipe_page(context)
            with gr.Tab("Training", id="training"):
                training = training_page(context, run)
            with gr.Tab("Copy check", id="copy"):
                copy = copy_page(context, run)
            with gr.Tab("Result", id="result"):
                result = result_page(context, run)
            with gr.Tab("Runs", id="runs"):
                all_runs = runs_page(context, run)
        # What this page shows already, by slot; a gr.State would cost every tab a connection that stays open, and a
        # browser has six of them for all its tabs.
        seen = gr.Textbox("{}", visible=False)
        tasks: dict[Kind, TaskPart] = {"caption": images.captions, "publish": result.upload}
        slots = {"strip": strip, **training.slots, **copy.slots, **result.slots, **all_runs.slots}
        slots |= {kind: task.told for kind, task in tasks.items()}
        buttons = training.buttons
        outputs = [
            *(slots[slot] for slot in SLOTS), run, copy.epoch, copy.stop, training.waiting, result.prompt,
            *result.epochs, all_runs.other, *buttons.values(), *(task.end for task in tasks.values()), seen,
        ]  # fmt: skip

        def look(name: str | None, epoch: Any, known: str) -> list[Any]:
            seen_before: dict[str, str] = json.loads(known or "{}")
            if name not in context.jobs.names():
                name = context.default_run()
            # Which epoch was chosen means nothing in another run, and whoever looks at the last one wants the last one.
            same = seen_before.get("name") == name and str(epoch) != seen_before.get("last")
            chosen = int(epoch) if same and epoch is not None else None
            now = snapshot(context, name, chosen)
            change = _Changes(seen_before)
            change.seen |= {"name": name or "", "last": str(max(now.epochs, default=None))}
            can, epochs = now.can, [("base" if e == 0 else str(e), e) for e in now.epochs]
            shown = chosen if chosen in now.epochs else max(now.epochs, default=None)
            values = [change(slot, value=now.html[slot]) for slot in SLOTS]
            values += [
                change("run", choices=now.names, value=name),
                change("epochs", (name, now.epochs), choices=epochs, value=shown),
                change("copy-stop", visible=can["stop"]),
                change("waiting", choices=now.waiting, value=next(iter(now.waiting), None)),
                change("prompt", placeholder=now.prompt),
                change("epoch", (name, now.loras, now.kept), choices=now.loras, value=now.kept),
                change(
                    "other epoch",
                    (name, now.loras, now.kept),
                    choices=now.loras,
                    value=next((e for e in reversed(now.loras) if e != now.kept), now.kept),
                ),
                change("other", choices=now.names),
                *(change(wish, visible=can[wish]) for wish in buttons),
                *(change(f"end {k}", value=now.ends[k] or "", visible=now.ends[k] is not None) for k in tasks),
            ]
            return [*values, json.dumps(change.seen)]

        def look_safely(name: str | None, epoch: Any, known: str) -> list[Any]:
            try:
                return look(name, epoch, known)
            except Exception as error:
                # What is shown stays; the next look, two seconds from now, may succeed.
                context.log(traceback.format_exc())
                return [views.failure(context.unexpected(error)), *(gr.skip() for _ in outputs[1:])]

        inputs = [run, copy.epoch, seen]

        def follow(event: Any) -> None:
            event.then(look_safely, inputs, outputs, show_progress="hidden", queue=False)

        def begin() -> list[Any]:
            notes = update_draft(context.studio)
            draft = context.draft()
            return [
                gr.update(choices=context.sets(), value=draft.images or None),
                *images_tab.show(context, draft),
                *recipe_form.fill(context, draft),
                recipe_form.plan_html(context, draft),
                views.message(" ".join(notes), "busy") if notes else "",
            ]

        def arrive(name: str) -> list[Any]:
            """What depends on the images; all else stays as it is being written."""
            draft = context.draft()
            named = gr.skip() if name else recipe_form.proposed_name(context, draft)
            return [named, recipe_form.plan_html(context, draft)]

        def start(*values: Any) -> list[Any]:
            name = None

            def action() -> str:
                nonlocal name
                draft = recipe_form.read(context, values)
                config = draft.config(context.studio)
                told = context.jobs.add(config)
                write_draft(context.studio, replace(draft, name=""))
                name = config.name
                return told

            told = context.attempt(action)
            if name is None:
                return [told, gr.skip(), gr.skip(), gr.skip()]
            # The next run needs a name of its own.
            return [told, gr.Tabs(selected="training"), gr.update(choices=context.jobs.names(), value=name), ""]

        def clone(name: Any) -> list[Any]:
            told = clone_into_draft(context, name)
            return [told, gr.Tabs(selected="recipe"), *begin()]

        whole_draft = [images.choice, *images.parts, *recipe.controls, recipe.plan, recipe.note]
        blocks.load(begin, None, whole_draft, show_progress="hidden", queue=False)
        blocks.load(look_safely, inputs, outputs, show_progress="hidden", queue=False)
        gr.Timer(EVERY_SECONDS).tick(look_safely, inputs, outputs, show_progress="hidden", queue=False)
        run.input(look_safely, inputs, outputs, show_progress="hidden", queue=False)
        copy.epoch.input(look_safely, inputs, outputs, show_progress="hidden", queue=False)
        images.next.click(lambda: gr.Tabs(selected="recipe"), None, tabs, show_progress="hidden")
        arrived = [recipe.name, recipe.plan]
        recipe_tab.select(arrive, recipe.name, arrived, show_progress="hidden", **recipe_form.IN_TURN)
        follow(
            recipe.start.click(start, recipe.controls, [recipe.note, tabs, run, recipe.name], show_progress="hidden")
        )
        all_runs.clone.click(clone, run, [all_runs.note, tabs, *whole_draft], show_progress="hidden")
        for move in (*training.moves, *copy.moves, *all_runs.moves, *(m for e in tasks.values() for m in e.moves)):
            follow(move)
    return blocks


class _Changes:
    """What a page shows already, so that only what is new is sent.

    Args:
        before: A digest for every part of the page, as it is there.
    """

    def __init__(self, before: dict[str, str]) -> None:
        self._before = before
        self.seen: dict[str, str] = {}

    def __call__(self, part: str, key: Any = None, **update: Any) -> Any:
        """The update of a part, or nothing if it is as it was; `key` stands for it where it is not the update."""
        self.seen[part] = hashlib.sha256(repr(update if key is None else key).encode()).hexdigest()[:16]
        return gr.skip() if self._before.get(part) == self.seen[part] else gr.update(**update)
