"""The page of images: they are uploaded, checked by the doctor, and captioned.

Every handler returns what the page shows then, from the draft's set of images.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gradio as gr

from sdlora.errors import SdloraError

from ..html import views
from ..settings.draft import Draft, write_draft
from ..state import image_set
from ..state.image_set import Card, SetView
from ..state.uploads import store_upload
from .background_tasks import TaskControls, caption_controls
from .context import Context

MAX_CARDS = 48
_NEW_SET = "my images"
_KINDS = ["image", ".txt", ".jsonl", ".zip"]


@dataclass(frozen=True)
class ImagesPage:
    """The controls of the page that others fill.

    Attributes:
        choice: The set.
        parts: The components that `show` gives values for.
        captions: The captions by a model.
        next: Leads on to the recipe.
    """

    choice: gr.Dropdown
    parts: list[gr.components.Component]
    captions: TaskControls
    next: gr.Button


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


def images_page(context: Context) -> ImagesPage:
    """Lay out the page and connect its controls."""
    with gr.Row(equal_height=True):
        drop = gr.File(
            label="Drop images, captions (.txt) or a zip of both here", file_count="multiple", file_types=_KINDS,
            height=150, scale=3, elem_id="drop",
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
    with gr.Accordion("Edit or write all captions at once", open=False, elem_id="all-captions"):
        editor = _caption_editor()
        captions = caption_controls(context)
    page = gr.Dropdown([], label="Images shown", visible=False, elem_id="cards-page")
    cards = gr.HTML(elem_id="cards")
    refresh = gr.Button(elem_id="refresh-set", visible="hidden")
    parts: list[gr.components.Component] = [summary, duplicates, page, cards]
    handlers = _Handlers(context)

    for upload in (drop, whole):
        upload.upload(handlers.add, [upload, choice], [note, choice, upload, *parts])
    choice.input(handlers.choose, choice, [note, *parts], show_progress="hidden")
    editor.replace.click(handlers.replace_words, [page, editor.find, editor.replacement], [note, *parts])
    editor.add_trigger.click(handlers.add_trigger, page, [note, *parts])
    editor.fill.click(handlers.fill_missing, [page, editor.caption], [note, *parts])
    page.input(handlers.show_page, page, parts, show_progress="hidden")
    # Outside of the queue, whose stream would be cut off by every reload.
    captions.status.change(handlers.show_when_captioned, page, parts, show_progress="hidden", queue=False)
    refresh.click(lambda page: handlers.show_page(page)[:2], page, [summary, duplicates], show_progress="hidden")
    return ImagesPage(choice, parts, captions, onward)


@dataclass(frozen=True)
class _CaptionEditor:
    find: gr.Textbox
    replacement: gr.Textbox
    replace: gr.Button
    caption: gr.Textbox
    fill: gr.Button
    add_trigger: gr.Button


def _caption_editor() -> _CaptionEditor:
    with gr.Row(elem_classes="ends"):
        find = gr.Textbox(label="Find", min_width=160)
        replacement = gr.Textbox(label="Replace with", min_width=160)
        replace_all = gr.Button("Replace in all captions", min_width=160)
    with gr.Row(elem_classes="ends"):
        caption = gr.Textbox(label="Caption for images without one", min_width=260)
        fill = gr.Button("Use it for all of them", min_width=200)
        add_trigger = gr.Button("Add the trigger word to all captions", min_width=200)
    return _CaptionEditor(find, replacement, replace_all, caption, fill, add_trigger)


@dataclass(frozen=True)
class _Handlers:
    """The page's handlers; `page` is the chosen page of a large set."""

    context: Context

    def add(self, files: list[str] | None, images: str | None) -> list[Any]:
        """Take uploaded files into the chosen set."""
        draft = self.context.draft()
        draft = replace(draft, images=images or draft.images or _NEW_SET)

        def action() -> str:
            uploaded = [Path(file) for file in files or []]
            try:
                intake = store_upload([(file.name, file) for file in uploaded], self.context.own_folder(draft.images))
            finally:
                for file in uploaded:
                    file.unlink(missing_ok=True)
            write_draft(self.context.studio, draft)
            added = f"{len(intake.images)} images and {intake.num_captions} captions were added."
            return "\n".join([added, *(f"Left out: {reason}" for reason in intake.refused)])

        message = self.context.attempt(action)
        choice = gr.update(choices=self.context.sets(), value=draft.images)
        return [message, choice, None, *show(self.context, draft)]

    def choose(self, images: str | None) -> list[Any]:
        """Make a set the draft's."""
        draft = replace(self.context.draft(), images=(images or "").strip())
        write_draft(self.context.studio, draft)
        return ["", *show(self.context, draft)]

    def replace_words(self, page: str | None, find: str, replacement: str) -> list[Any]:
        """Replace words in all captions."""
        return self._edit(
            page, lambda folder, _: image_set.replace_words(folder, find, replacement), "captions were changed."
        )

    def add_trigger(self, page: str | None) -> list[Any]:
        """Put the trigger word into all captions."""
        return self._edit(
            page, lambda folder, draft: image_set.prepend_trigger(folder, draft.trigger), "captions were changed."
        )

    def fill_missing(self, page: str | None, caption: str) -> list[Any]:
        """Give all images without a caption the same one."""
        return self._edit(
            page, lambda folder, _: image_set.fill_missing_captions(folder, caption), "images got this caption."
        )

    def _edit(self, page: str | None, edit: Callable[[Path, Draft], int], done: str) -> list[Any]:
        draft = self.context.draft()
        message = self.context.attempt(lambda: f"{edit(self.context.own_folder(draft.images), draft)} {done}")
        return [message, *show(self.context, draft, page)]

    def show_page(self, page: str | None) -> list[Any]:
        """The set as it is now."""
        return show(self.context, self.context.draft(), page)

    def show_when_captioned(self, page: str | None) -> list[Any]:
        """The set as it is now, unless captions are being written."""
        task = self.context.tasks.find("caption")
        ended = task is not None and self.context.tasks.stage(task) != "running"
        # A person may edit captions while the model writes others: their text must not change under the cursor.
        return self.show_page(page) if ended else [gr.skip() for _ in range(4)]
