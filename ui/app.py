"""The studio's pages put together: what leads from one to the next, and what is kept up to date.

Floor 8. Every page asks for a snapshot each two seconds and changes only what is not as it was.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

import gradio as gr

from . import page_pictures, page_recipe
from .context import Context
from .draft import write_draft
from .page_pictures import pictures_page
from .page_recipe import recipe_page
from .page_result import clone_into_draft, result_page, runs_page
from .page_training import copy_page, training_page
from .snapshot import SLOTS, snapshot

EVERY_SECONDS = 2
HEAD = (
    "<link rel='stylesheet' href='/studio/studio.css'><script src='/studio/studio.js' defer></script>"
    "<meta name='viewport' content='width=device-width, initial-scale=1'>"
)


def theme() -> gr.themes.Base:
    """Quiet colours and the system's own fonts, so that none is fetched."""
    return gr.themes.Base(
        primary_hue="blue", neutral_hue="zinc", radius_size="sm",
        font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"],
    )  # fmt: skip


def build(context: Context) -> gr.Blocks:
    """All pages.

    Args:
        context: The studio behind them.
    """
    with gr.Blocks(
        title="sdlora studio", analytics_enabled=False, delete_cache=(3600, 3600), fill_width=True
    ) as blocks:
        with gr.Row(equal_height=True, elem_id="top"):
            with gr.Column(scale=3, min_width=240):
                gr.HTML("<h1 class='brand'>sdlora studio</h1>")
                strip = gr.HTML(elem_id="strip")
            run = gr.Dropdown(label="Run", min_width=180, scale=1, elem_id="run")
        with gr.Tabs(elem_id="steps") as tabs:
            with gr.Tab("Pictures", id="pictures"):
                pictures = pictures_page(context)
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
        slots = {"strip": strip, **training.slots, **copy.slots, **result.slots, **all_runs.slots}
        buttons = training.buttons
        outputs = [
            *(slots[slot] for slot in SLOTS), run, copy.epoch, copy.stop, training.waiting, *result.epochs,
            all_runs.other, *buttons.values(), seen,
        ]  # fmt: skip

        def look(name: str | None, epoch: Any, known: str) -> list[Any]:
            before: dict[str, str] = json.loads(known or "{}")
            if name not in context.jobs.names():
                name = context.default_run()
            same_run = before.get("name") == name
            chosen = int(epoch) if same_run and epoch is not None else None
            now = snapshot(context, name, chosen)
            after: dict[str, str] = {"name": name or ""}

            def changed(slot: str, value: Any, update: Callable[[], Any]) -> Any:
                after[slot] = hashlib.sha256(repr(value).encode()).hexdigest()[:16]
                return gr.skip() if before.get(slot) == after[slot] else update()

            last = now.epochs[-1] if now.epochs else None
            shown_epoch = chosen if chosen in now.epochs else last
            kept = now.loras[-1] if now.loras else None
            stop = now.can["stop"]
            values = [changed(slot, now.html[slot], lambda slot=slot: now.html[slot]) for slot in SLOTS]
            values += [
                changed("run", (now.names, name), lambda: gr.update(choices=now.names, value=name)),
                changed(
                    "epochs", (name, now.epochs),
                    lambda: gr.update(choices=[(_epoch(e), e) for e in now.epochs], value=shown_epoch),
                ),
                changed("copy-stop", stop, lambda: gr.update(interactive=stop)),
                changed("waiting", now.waiting, lambda: gr.update(choices=now.waiting, value=next(iter(now.waiting), None))),
                *(
                    changed(f"loras{i}", (name, now.loras), lambda: gr.update(choices=now.loras, value=kept))
                    for i in range(len(result.epochs))
                ),
                changed("other", now.names, lambda: gr.update(choices=now.names)),
                *(changed(k, now.can[k], lambda k=k: gr.update(interactive=now.can[k])) for k in buttons),
            ]  # fmt: skip
            return [*values, json.dumps(after)]

        inputs = [run, copy.epoch, seen]

        def follow(event: Any) -> None:
            event.then(look, inputs, outputs, show_progress="hidden", queue=False)

        def begin() -> list[Any]:
            draft = context.draft()
            return [
                gr.update(choices=context.sets(), value=draft.pictures or None),
                *page_pictures.show(context, draft),
                *page_recipe.fill(context, draft),
                page_recipe.plan_html(context, draft),
            ]

        def to_recipe() -> list[Any]:
            draft = context.draft()
            return [
                gr.Tabs(selected="recipe"), *page_recipe.fill(context, draft), page_recipe.plan_html(context, draft)
            ]  # fmt: skip

        def start(*values: Any) -> list[Any]:
            name = None

            def action() -> str:
                nonlocal name
                draft = page_recipe.read(context, values)
                config = draft.config(context.studio)
                write_draft(context.studio, draft)
                told = context.jobs.add(config)
                name = config.name
                return told

            told = context.attempt(action)
            if name is None:
                return [told, gr.skip(), gr.skip()]
            return [told, gr.Tabs(selected="training"), gr.update(choices=context.jobs.names(), value=name)]

        def clone(name: Any) -> list[Any]:
            told = clone_into_draft(context, name)
            return [told, gr.Tabs(selected="recipe"), *begin()]

        whole_draft = [pictures.choice, *pictures.parts, *recipe.controls, recipe.plan]
        blocks.load(begin, None, whole_draft, show_progress="hidden", queue=False)
        blocks.load(look, inputs, outputs, show_progress="hidden", queue=False)
        gr.Timer(EVERY_SECONDS).tick(look, inputs, outputs, show_progress="hidden", queue=False)
        run.input(look, inputs, outputs, show_progress="hidden", queue=False)
        copy.epoch.input(look, inputs, outputs, show_progress="hidden", queue=False)
        to_the_recipe = [tabs, *recipe.controls, recipe.plan]
        pictures.next.click(to_recipe, None, to_the_recipe, show_progress="hidden")
        recipe_tab.select(lambda: to_recipe()[1:], None, to_the_recipe[1:], show_progress="hidden")
        follow(recipe.start.click(start, recipe.controls, [recipe.note, tabs, run], show_progress="hidden"))
        all_runs.clone.click(clone, run, [all_runs.note, tabs, *whole_draft], show_progress="hidden")
        for move in (*training.moves, *copy.moves, *all_runs.moves):
            follow(move)
    return blocks


def _epoch(epoch: int) -> str:
    return "base" if epoch == 0 else str(epoch)
