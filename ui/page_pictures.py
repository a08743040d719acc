"""The page of pictures: taken in, looked at by the doctor, captioned.

Floor 8.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gradio as gr

from sdlora.errors import SdloraError

from . import sets, views
from .context import Context
from .draft import Draft, write_draft
from .uploads import take_in

_NEW_SET = "my pictures"
_KINDS = ["image", ".txt", ".jsonl", ".zip"]


@dataclass(frozen=True)
class PicturesPage:
    """The parts of the page that others fill.

    Attributes:
        choice: Which set.
        parts: What `show` gives: summary, cards, near-duplicates.
        next: Leads on to the recipe.
    """

    choice: gr.Dropdown
    parts: list[gr.HTML]
    next: gr.Button


def show(context: Context, draft: Draft) -> list[str]:
    """The set of a draft as HTML: summary, cards, near-duplicates."""
    try:
        view = context.view_set(draft)
    except SdloraError as error:
        return [views.failure(error), "", ""]
    shown = context.studio.shown
    return [views.set_summary(view), views.set_cards(view, shown, draft.pictures), views.twins(view, shown)]


def pictures_page(context: Context) -> PicturesPage:
    """Lay the page out and say what its controls do."""
    with gr.Row(equal_height=True):
        drop = gr.File(
            label="Drop pictures, captions (.txt) or a zip of both here", file_count="multiple", file_types=_KINDS,
            height=150, scale=3, elem_id="drop",
        )  # fmt: skip
        with gr.Column(scale=2, min_width=260):
            choice = gr.Dropdown(
                label="Set of pictures", allow_custom_value=True, elem_id="set",
                info="Pick one, type a new name before you add pictures, or name a folder of this machine.",
            )  # fmt: skip
            whole = gr.UploadButton("Add a whole folder", file_count="directory", size="md")
    note = gr.HTML(elem_id="pictures-note")
    summary = gr.HTML(elem_id="set-summary")
    onward = gr.Button("Next: the recipe", variant="primary", elem_id="to-recipe")
    doubles = gr.HTML()
    with gr.Accordion("Change all captions at once", open=False):
        with gr.Row(elem_classes="ends"):
            find = gr.Textbox(label="Find", min_width=160)
            replacement = gr.Textbox(label="Replace with", min_width=160)
            exchange = gr.Button("Replace in all captions", min_width=160)
        with gr.Row(elem_classes="ends"):
            trigger = gr.Button("Put the trigger into all captions", min_width=160)
            rest = gr.Textbox(label="Caption for pictures that have none", min_width=160)
            fill = gr.Button("Caption the rest", min_width=160)
    cards = gr.HTML(elem_id="cards")
    refresh = gr.Button(elem_id="refresh-set", visible="hidden")
    parts = [summary, cards, doubles]

    def add(files: list[str] | None, pictures: str | None) -> list[Any]:
        draft = context.draft()
        draft = replace(draft, pictures=pictures or draft.pictures or _NEW_SET)

        def taken() -> str:
            sent = [Path(file) for file in files or []]
            try:
                intake = take_in([(file.name, file) for file in sent], context.own_folder(draft.pictures))
            finally:
                for file in sent:
                    file.unlink(missing_ok=True)
            write_draft(context.studio, draft)
            told = f"{len(intake.pictures)} pictures and {intake.num_captions} captions were added."
            return "\n".join([told, *(f"Left out: {reason}" for reason in intake.refused)])

        told = context.attempt(taken)
        return [told, gr.update(choices=context.sets(), value=draft.pictures), None, *show(context, draft)]

    def choose(pictures: str | None) -> list[str]:
        draft = replace(context.draft(), pictures=(pictures or "").strip())
        write_draft(context.studio, draft)
        return ["", *show(context, draft)]

    def change_all(action: Callable[[Path, Draft], str]) -> list[str]:
        draft = context.draft()
        told = context.attempt(lambda: action(context.own_folder(draft.pictures), draft))
        return [told, *show(context, draft)]

    def exchange_words(old: str, new: str) -> list[str]:
        return change_all(lambda folder, _: f"{sets.replace_words(folder, old, new)} captions were changed.")

    def put_trigger() -> list[str]:
        return change_all(lambda folder, draft: f"{sets.put_trigger_in(folder, draft.trigger)} captions were changed.")

    def fill_rest(words: str) -> list[str]:
        return change_all(lambda folder, _: f"{sets.caption_the_rest(folder, words)} pictures got this caption.")

    def look_again() -> list[str]:
        found = show(context, context.draft())
        return [found[0], found[2]]

    drop.upload(add, [drop, choice], [note, choice, drop, *parts])
    whole.upload(add, [whole, choice], [note, choice, whole, *parts])
    choice.input(choose, choice, [note, *parts], show_progress="hidden")
    exchange.click(exchange_words, [find, replacement], [note, *parts])
    trigger.click(put_trigger, None, [note, *parts])
    fill.click(fill_rest, rest, [note, *parts])
    refresh.click(look_again, None, [summary, doubles], show_progress="hidden")
    return PicturesPage(choice, parts, onward)
