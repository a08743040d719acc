"""The page of images: taken in, looked at by the doctor, captioned."""

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
from ..state.uploads import take_in
from .background_tasks import TaskPart, caption_part
from .context import Context

MOST_CARDS = 48
_NEW_SET = "my images"
_KINDS = ["image", ".txt", ".jsonl", ".zip"]


@dataclass(frozen=True)
class ImagesPage:
    """The parts of the page that others fill.

    Attributes:
        choice: Which set.
        parts: What `show` gives values for.
        captions: What a model is asked for.
        next: Leads on to the recipe.
    """

    choice: gr.Dropdown
    parts: list[gr.components.Component]
    captions: TaskPart
    next: gr.Button


def show(context: Context, draft: Draft, wanted: str | None = None) -> list[Any]:
    """The set of a draft: summary, near-duplicates, the choice of what is shown, and that as cards.

    Args:
        context: The studio.
        draft: Whose images.
        wanted: What to show of a large set, as the choice has it; the beginning if it has no such part.
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
    """A set in parts that a browser shows with ease, by what each is called; those to mend are a part, too."""
    cards = view.cards
    pages = {
        f"{first + 1} to {min(first + MOST_CARDS, len(cards))} of {len(cards)}": cards[first : first + MOST_CARDS]
        for first in range(0, max(1, len(cards)), MOST_CARDS)
    }
    marked = tuple(card for card in cards if card.severity != "fine")
    if len(pages) > 1 and marked:
        first = f", the first {MOST_CARDS}" if len(marked) > MOST_CARDS else ""
        pages[f"Those to look at: {len(marked)}{first}"] = marked[:MOST_CARDS]
    return pages


def images_page(context: Context) -> ImagesPage:
    """Lay the page out and say what its controls do."""
    with gr.Row(equal_height=True):
        drop = gr.File(
            label="Drop images, captions (.txt) or a zip of both here", file_count="multiple", file_types=_KINDS,
            height=150, scale=3, elem_id="drop",
        )  # fmt: skip
        with gr.Column(scale=2, min_width=260):
            choice = gr.Dropdown(
                label="Set of images", allow_custom_value=True, elem_id="set",
                info="Pick one, type a new name before you add images, or name a folder of this machine.",
            )  # fmt: skip
            whole = gr.UploadButton("Add a whole folder", file_count="directory", size="md")
    note = gr.HTML(elem_id="pictures-note")
    summary = gr.HTML(elem_id="set-summary")
    onward = gr.Button("Next: the recipe", variant="primary", elem_id="to-recipe")
    doubles = gr.HTML()
    with gr.Accordion("Change or write all captions at once", open=False, elem_id="all-captions"):
        with gr.Row(elem_classes="ends"):
            find = gr.Textbox(label="Find", min_width=160)
            replacement = gr.Textbox(label="Replace with", min_width=160)
            exchange = gr.Button("Replace in all captions", min_width=160)
        with gr.Row(elem_classes="ends"):
            rest = gr.Textbox(label="Caption for images that have none", min_width=260)
            fill = gr.Button("Give it to all of them", min_width=200)
            trigger = gr.Button("Put the trigger into all captions", min_width=200)
        captions = caption_part(context)
    page = gr.Dropdown([], label="Images shown", visible=False, elem_id="cards-page")
    cards = gr.HTML(elem_id="cards")
    refresh = gr.Button(elem_id="refresh-set", visible="hidden")
    parts = [summary, doubles, page, cards]

    def add(files: list[str] | None, images: str | None) -> list[Any]:
        draft = context.draft()
        draft = replace(draft, images=images or draft.images or _NEW_SET)

        def taken() -> str:
            sent = [Path(file) for file in files or []]
            try:
                intake = take_in([(file.name, file) for file in sent], context.own_folder(draft.images))
            finally:
                for file in sent:
                    file.unlink(missing_ok=True)
            write_draft(context.studio, draft)
            told = f"{len(intake.images)} images and {intake.num_captions} captions were added."
            return "\n".join([told, *(f"Left out: {reason}" for reason in intake.refused)])

        told = context.attempt(taken)
        return [told, gr.update(choices=context.sets(), value=draft.images), None, *show(context, draft)]

    def choose(images: str | None) -> list[Any]:
        draft = replace(context.draft(), images=(images or "").strip())
        write_draft(context.studio, draft)
        return ["", *show(context, draft)]

    def change_all(part: str | None, action: Callable[[Path, Draft], str]) -> list[Any]:
        draft = context.draft()
        told = context.attempt(lambda: action(context.own_folder(draft.images), draft))
        return [told, *show(context, draft, part)]

    def exchange_words(part: str | None, old: str, new: str) -> list[Any]:
        return change_all(part, lambda folder, _: f"{image_set.replace_words(folder, old, new)} captions were changed.")

    def put_trigger(part: str | None) -> list[Any]:
        return change_all(
            part, lambda folder, draft: f"{image_set.put_trigger_in(folder, draft.trigger)} captions were changed."
        )

    def fill_rest(part: str | None, words: str) -> list[Any]:
        return change_all(
            part, lambda folder, _: f"{image_set.caption_the_rest(folder, words)} images got this caption."
        )

    def look_again(part: str | None) -> list[Any]:
        return show(context, context.draft(), part)

    def look_when_captioned(part: str | None) -> list[Any]:
        task = context.tasks.find("caption")
        ended = task is not None and context.tasks.stage(task) != "running"
        # While the model writes, so may a person: their words are not taken from under the cursor.
        return look_again(part) if ended else [gr.skip() for _ in parts]

    drop.upload(add, [drop, choice], [note, choice, drop, *parts])
    whole.upload(add, [whole, choice], [note, choice, whole, *parts])
    choice.input(choose, choice, [note, *parts], show_progress="hidden")
    exchange.click(exchange_words, [page, find, replacement], [note, *parts])
    trigger.click(put_trigger, page, [note, *parts])
    fill.click(fill_rest, [page, rest], [note, *parts])
    page.input(look_again, page, parts, show_progress="hidden")
    # Outside of the queue, whose stream would be cut off by every reload.
    captions.told.change(look_when_captioned, page, parts, show_progress="hidden", queue=False)
    refresh.click(lambda part: look_again(part)[:2], page, [summary, doubles], show_progress="hidden")
    return ImagesPage(choice, parts, captions, onward)
