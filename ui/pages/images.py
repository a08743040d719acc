"""The page of images: they are uploaded, checked by the doctor, and captioned.

Every handler returns what the page shows then, from the draft's set of images.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr

from sdlora.errors import SdloraError

from ..html import views
from ..settings.draft import Draft, write_draft
from ..state import image_set
from ..state.image_set import Card, SetView
from ..state.uploads import store_upload
from .background_tasks import caption_controls
from .context import Context, Live

MAX_CARDS = 48
_NEW_SET = "my images"
_KINDS = ["image", ".txt", ".caption", ".json", ".jsonl", ".zip"]


def show(context: Context, draft: Draft, wanted: str | None = None) -> list[Any]:
    """The set of a draft: summary, near-duplicates, the choice of the cards' page, and the cards.

    Args:
        context: The studio.
        draft: Its images are shown.
        wanted: A page of a large set, by its label; the first one if there is no such page.
    """
    try:
        view = context.view_set(draft)
    except SdloraError as error:
        return [views.failure(error), "", gr.update(visible=False), ""]
    shown, pages = context.studio.shown, cards_by_page(view)
    page = wanted if wanted in pages else next(iter(pages))
    cards = views.set_cards(pages[page], view.folder, shown, draft.images)
    chosen = gr.update(choices=list(pages), value=page, visible=len(pages) > 1)
    return [views.set_summary(view), views.duplicates(view, shown), chosen, cards]


def cards_by_page(view: SetView) -> dict[str, tuple[Card, ...]]:
    """A set in pages small enough for a browser, by label; images with findings have a page too."""
    cards = view.cards
    pages = {
        f"{first + 1} to {min(first + MAX_CARDS, len(cards))} of {len(cards)}": cards[first : first + MAX_CARDS]
        for first in range(0, max(1, len(cards)), MAX_CARDS)
    }
    marked = tuple(card for card in cards if card.severity != "fine")
    if len(pages) > 1 and marked:
        first = f", the first {MAX_CARDS}" if len(marked) > MAX_CARDS else ""
        pages[f"With problems: {len(marked)}{first}"] = marked[:MAX_CARDS]
    return pages


def images_page(context: Context, live: Live) -> tuple[list[gr.components.Component], gr.Button]:
    """Lay out the page and connect its controls.

    Returns:
        The choice of a set and the components that `show` gives values for, and the button that leads on.
    """
    with gr.Row(equal_height=True):
        drop = gr.File(
            label="Drop images, captions (.txt, .caption, .json) or a zip of both here", file_count="multiple",
            file_types=_KINDS, height=150, scale=3, elem_id="drop",
        )  # fmt: skip
        with gr.Column(scale=2, min_width=260):
            choice = gr.Dropdown(
                label="Set of images", allow_custom_value=True, elem_id="set",
                info="Choose a set, type a name for a new one, or enter a folder of this machine.",
            )  # fmt: skip
            whole = gr.UploadButton("Add a whole folder", file_count="directory", size="md")
    note = gr.HTML(elem_id="pictures-note")
    summary = gr.HTML(elem_id="set-summary")
    onward = gr.Button("Next: the recipe", variant="primary", elem_id="to-recipe")
    duplicates = gr.HTML()
    page = gr.Dropdown([], label="Images shown", visible=False, elem_id="cards-page", render=False)
    cards = gr.HTML(elem_id="cards", render=False)
    parts: list[gr.components.Component] = [summary, duplicates, page, cards]
    with gr.Accordion("Edit or write all captions at once", open=False, elem_id="all-captions"):
        _caption_editor(context, page, [note, *parts])
        caption_controls(context, live)
    page.render()  # type: ignore[no-untyped-call]
    cards.render()  # type: ignore[no-untyped-call]
    refresh = gr.Button(elem_id="refresh-set", visible="hidden")

    def choose(images: str | None) -> list[Any]:
        draft = context.draft().with_images((images or "").strip())
        write_draft(context.studio, draft)
        return ["", *show(context, draft)]

    def show_page(chosen: str | None) -> list[Any]:
        return show(context, context.draft(), chosen)

    def show_when_captioned(chosen: str | None) -> list[Any]:
        task = context.tasks.find("caption")
        ended = task is not None and context.tasks.stage(task) != "running"
        # A person may edit captions while the model writes others: their text must not change under the cursor.
        return show_page(chosen) if ended else [gr.skip() for _ in parts]

    for upload in (drop, whole):
        upload.upload(lambda *values: _add(context, *values), [upload, choice], [note, choice, upload, *parts])
    choice.input(choose, choice, [note, *parts], show_progress="hidden")
    page.input(show_page, page, parts, show_progress="hidden")
    # Outside of the queue, whose stream would be cut off by every reload.
    live.parts["caption"].change(show_when_captioned, page, parts, show_progress="hidden", queue=False)
    refresh.click(lambda chosen: show_page(chosen)[:2], page, [summary, duplicates], show_progress="hidden")
    return [choice, *parts], onward


def _add(context: Context, files: list[str] | None, images: str | None) -> list[Any]:
    """Take uploaded files into the chosen set."""
    draft = context.draft()
    draft = draft.with_images(images or draft.images or _NEW_SET)

    def action() -> str:
        uploaded = [Path(file) for file in files or []]
        try:
            intake = store_upload([(file.name, file) for file in uploaded], context.own_folder(draft.images))
        finally:
            for file in uploaded:
                file.unlink(missing_ok=True)
        write_draft(context.studio, draft)
        added = f"{len(intake.images)} images and {intake.num_captions} captions were added."
        return "\n".join([added, *(f"Left out: {reason}" for reason in intake.refused)])

    message = context.attempt(action)
    return [message, gr.update(choices=context.sets(), value=draft.images), None, *show(context, draft)]


def _caption_editor(context: Context, page: gr.Dropdown, outputs: list[gr.components.Component]) -> None:
    """Lay out what changes all captions of the set; `outputs` are a message and what `show` fills."""
    with gr.Row(elem_classes="ends"):
        find = gr.Textbox(label="Find", min_width=160)
        replacement = gr.Textbox(label="Replace with", min_width=160)
        replace_all = gr.Button("Replace in all captions", min_width=160)
    with gr.Row(elem_classes="ends"):
        caption = gr.Textbox(label="Caption for images without one", min_width=260)
        fill = gr.Button("Use it for all of them", min_width=200)
        add_trigger = gr.Button("Add the trigger word to all captions", min_width=200)

    def on_click(button: gr.Button, edit: Callable[..., int], done: str, *words: gr.Textbox) -> None:
        def change(chosen: str | None, *texts: str) -> list[Any]:
            draft = context.draft()
            message = context.attempt(lambda: f"{edit(context.own_folder(draft.images), *texts)} {done}")
            return [message, *show(context, draft, chosen)]

        button.click(change, [page, *words], outputs)

    def prepend_trigger(folder: Path) -> int:
        return image_set.prepend_trigger(folder, context.draft().trigger)

    on_click(replace_all, image_set.replace_words, "captions were changed.", find, replacement)
    on_click(add_trigger, prepend_trigger, "captions were changed.")
    on_click(fill, image_set.fill_missing_captions, "images got this caption.", caption)
