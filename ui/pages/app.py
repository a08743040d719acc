"""All pages of the studio together: how one leads to the next, and how they are kept up to date.

Every page asks every two seconds whether anything that it shows has changed, and only then for what that is.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr

from ..html import views
from ..html.render import render
from ..settings.draft import update_draft
from . import images as images_tab
from . import recipe as recipe_form
from .context import ANY_VALUE, Context, Live, snapshot
from .images import images_page
from .looks import Look
from .recipe import recipe_page
from .result import clone_into_draft, result_page, runs_page
from .training import copy_page, training_page

PAGES = ("images", "recipe", "training", "copy-check", "result", "runs")
"""The pages in their order, as addresses name them after `#`."""
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
    """All pages, as Gradio's Blocks."""
    with gr.Blocks(
        title="sdlora studio", analytics_enabled=False, delete_cache=(3600, 3600), fill_width=True
    ) as blocks:
        with gr.Row(elem_id="top"):
            with gr.Column(scale=3, min_width=240):
                gr.HTML(render("brand.html"))
                strip = gr.HTML(elem_id="strip")
            run = gr.Dropdown(label="Run", min_width=180, scale=1, elem_id="run")
        live = Live(run, {"strip": strip, "run": run})
        with gr.Tabs(elem_id="steps") as tabs:
            with gr.Tab("Images", id="images"):
                choice, images, trigger, onward = images_page(context, live, tabs)
            with gr.Tab("Recipe", id="recipe") as recipe_tab:
                recipe, recipe_note, loaded = recipe_page(context, live, tabs, images.images, trigger)
            with gr.Tab("Training", id="training"):
                training_page(context, live)
            with gr.Tab("Copy check", id="copy-check"):
                copy_page(context, live)
            with gr.Tab("Result", id="result"):
                result_page(context, live)
            with gr.Tab("Runs", id="runs"):
                clone, runs_note = runs_page(context, live)
        images_shown = [choice, *images.all()]
        draft = [*images_shown, *recipe, recipe_note]
        address = gr.Textbox(visible=False)

        def show_recipe(shown: str, *values: Any) -> list[Any]:
            """The recipe of the images that this tab shows, which another tab may have exchanged in the draft."""
            found = context.draft()
            return recipe_form.show_again(context, found.with_images(shown) if shown else found, values)

        def show_images() -> list[Any]:
            chosen = context.draft().images
            return [gr.update(choices=context.sets(), value=chosen or None), *images_tab.show(context, chosen)]

        def open_page(asked: Any) -> list[Any]:
            return [gr.Tabs(selected=first_page(context, str(asked).removeprefix("#"))), *_show_draft(context)]

        def clone_run(chosen: Any) -> list[Any]:
            message = context.attempt(clone_into_draft, context, chosen)
            return [message, gr.Tabs(selected="recipe"), *_show_draft(context)]

        opened = blocks.load(
            open_page, address, [tabs, *draft], show_progress="hidden", queue=False, js="() => [location.hash]"
        )
        # Until then, what is shown is not what was left here the last time.
        # Gradio answers a call of an event without a function with an internal error.
        opened.then(
            lambda: None, None, None, show_progress="hidden", queue=False, js="() => { document.body.inert = false; }"
        )
        onward.click(lambda: gr.Tabs(selected="recipe"), None, tabs, show_progress="hidden", queue=False)
        controls = recipe[-recipe_form.num_controls() :]
        recipe_tab.select(show_recipe, [images.images, *controls], recipe, **recipe_form.IN_TURN)
        loaded.then(show_images, None, images_shown, show_progress="hidden")
        cloned = clone.click(clone_run, run, [runs_note, tabs, *draft], **{**ANY_VALUE, "show_progress_on": runs_note})
        for event in (opened, cloned):
            recipe_form.plan_after(context, event, recipe)
        _keep_up_to_date(context, live, images, blocks)
    return blocks


def first_page(context: Context, asked: str) -> str:
    """The page that is shown first: the one that the address names, else the run at work, or a result not seen yet."""
    if asked in PAGES:
        return asked
    name = context.default_run()
    status = context.jobs.status(name) if name else None
    if status is not None and status.alive:
        return "training"
    state = context.studio.run(name) / "state.json" if name else None
    is_new = state is not None and state.is_file() and not _is_newer(context.studio.draft, state)
    return "result" if status is not None and status.word == "done" and is_new else "images"


def _is_newer(file: Path, other: Path) -> bool:
    return file.is_file() and file.stat().st_mtime_ns > other.stat().st_mtime_ns


def _keep_up_to_date(context: Context, live: Live, images: images_tab.ShownSet, blocks: gr.Blocks) -> None:
    """Refresh what is live: on loading, at intervals, on a choice and after every click."""
    # What this page shows already, as a token. A gr.State would cost every tab a connection that stays open, and a
    # browser has six of them for all its tabs. `studio.js` reads it, and presses the button when there is news.
    seen = gr.Textbox("", visible="hidden", elem_id="seen")
    news = gr.Button(visible="hidden", elem_id="news")
    inputs = [live.run, live.parts["epochs"], images.images, images.fingerprint, seen]

    def refresh(name: str | None, epoch: Any, shown: str, drawn: str, token: str) -> dict[Any, Any]:
        try:
            known = context.looks.find(token)
            updates, look = changes(context, Look(name, epoch, shown, drawn, known.digests if known else {}))
            return {live.parts[part]: update for part, update in updates.items()} | {seen: context.looks.keep(look)}
        except Exception as error:
            # The rest stays as it is; the next refresh, two seconds from now, may succeed.
            return {live.parts["strip"]: context.unexpected(error)}

    for event in (
        blocks.load, news.click, live.run.input, live.parts["epochs"].input, images.fingerprint.change,
        *(event.then for event in live.events),
    ):  # fmt: skip
        event(refresh, inputs, [*live.parts.values(), seen], show_progress="hidden", queue=False, **ANY_VALUE)


def has_news(context: Context, token: str) -> bool:
    """Whether a tab that holds this token shows anything that has changed since."""
    look = context.looks.find(token)
    return look is None or bool(changes(context, look)[0])


def changes(context: Context, look: Look) -> tuple[dict[str, Any], Look]:
    """The updates of all parts that have changed since a tab was last told of them, and what it shows then."""
    before, name, epoch = dict(look.digests), look.run, look.epoch
    if name not in context.jobs.names():
        name = context.default_run()
    # A chosen epoch means nothing in another run, and a page that shows the last epoch follows it.
    same = before.get("name") == name and str(epoch) != before.get("last")
    chosen = int(epoch) if same and str(epoch).isdecimal() else None  # type: ignore[arg-type]
    now = snapshot(context, name, chosen)
    last = max(now.epochs, default=None)
    seen, updates = {"name": name or "", "last": str(last)}, {}

    def show(part: str, key: Any = None, **update: Any) -> None:
        """Update a part if it has changed; `key`, if given, is compared instead of the update."""
        seen[part] = hashlib.sha256(repr(update if key is None else key).encode()).hexdigest()[:16]
        if before.get(part) != seen[part]:
            updates[part] = gr.update(**update)

    for slot, html in now.html.items():
        show(slot, value=html)
    for note, cause in now.causes.items():
        # A note that is new to this tab stays.
        before.setdefault(note, hashlib.sha256(repr(cause).encode()).hexdigest()[:16])
        show(note, cause, value="")
    for action in ("pause", "proceed", "stop", "resume"):
        show(action, visible=now.can[action])
    for kind, label in now.ends.items():
        show(f"end {kind}", value=label or "", visible=label is not None)
    epochs = [(str(epoch or "base"), epoch) for epoch in now.epochs]
    show("epochs", (name, now.epochs), choices=epochs, value=chosen if chosen in now.epochs else last)
    show("restore", value=f"Undo: {now.deleted.words}" if now.deleted else "Undo", visible=now.deleted is not None)
    show("deleted", value=now.deleted.key if now.deleted else "")
    # With what is drawn: a set may change and change back between two looks, and be drawn in between.
    show("listing", value=f"{context.fingerprint(look.images)} {look.drawn}")
    show("copy-stop", visible=now.can["stop"])
    show("waiting", choices=now.waiting, value=next(iter(now.waiting), None))
    show("prompt", (name, now.prompt), value=now.prompt)
    other = next((epoch for epoch in reversed(now.loras) if epoch != now.kept), now.kept)
    show("epoch", (name, now.loras, now.kept), choices=now.loras, value=now.kept)
    show("other epoch", (name, now.loras, now.kept), choices=now.loras, value=other)
    show("run", choices=now.names, value=name)
    show("other", choices=now.names)
    return updates, replace(look, run=name, digests=seen)


def _show_draft(context: Context) -> list[Any]:
    """The images and the recipe as they were last edited; what the run needs is worked out later."""
    notes = update_draft(context.studio)
    draft = context.draft()
    return [
        gr.update(choices=context.sets(), value=draft.images or None),
        *images_tab.show(context, draft.images),
        *recipe_form.show_unplanned(context, draft),
        views.message(" ".join(notes), "busy") if notes else "",
    ]
