"""The page of images: they are uploaded, checked by the doctor, and captioned.

Every handler acts on the set that its own tab shows, which travels with the event; the draft only remembers the last
choice for tabs that are opened later.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from sdlora.common.remote import is_url
from sdlora.errors import SdloraError

from ..html import views
from ..settings.draft import write_draft
from ..state import image_set
from ..state.image_set import Card, SetView
from ..state.locations import check_location
from ..state.set_editor import SetEditor
from ..state.uploads import store_upload
from .background_tasks import caption_controls
from .context import ANY_VALUE, Context, Live

MAX_CARDS = 48
_NEW_SET = "my images"
_KINDS = ["image", ".txt", ".caption", ".json", ".jsonl", ".zip"]
# The cards belong to studio.js: Gradio would reuse text boxes for other images.
_CARDS = "<div class='sd'><div class='cards'></div></div>"
_DRAW_CARDS = """
    const draw = () => document.dispatchEvent(
        new CustomEvent('sdlora:cards', { detail: { home: element, html: props.value || '' } }));
    watch('value', draw);
    draw();
"""


@dataclass(frozen=True)
class ShownSet:
    """The components that show a set of images, in the order that `show` fills them."""

    images: gr.Textbox  # the set, as it was chosen; empty if it cannot be shown
    fingerprint: gr.Textbox  # of the images as they are shown
    summary: gr.HTML
    allow: gr.Button
    undo: gr.Button
    change: gr.Textbox  # what the undo button undoes
    put_back: gr.Button
    duplicates: gr.HTML
    page: gr.Dropdown
    cards: gr.HTML

    def all(self) -> list[gr.components.Component]:
        """All of them."""
        return [*vars(self).values()]


def show(context: Context, images: str, wanted: str | None = None) -> list[Any]:
    """The values of a `ShownSet`.

    Args:
        context: The studio.
        images: The set that is chosen; empty if none is.
        wanted: A page of a large set, by its label; the first one if there is no such page.
    """
    hidden = gr.update(visible=False)
    nothing = [hidden, hidden, "", hidden, "", gr.update(visible=False), ""]
    if not images:
        return ["", "", views.set_summary(SetView(Path(), (), (), ())), *nothing]
    try:
        if is_url(images):
            check_location(context.studio, images)
            return [images, "", views.message("They are downloaded when the run starts.", title=images), *nothing]
        editor = context.editor(images)
        view = context.view_set(context.draft().with_images(images))
        fingerprint = image_set.fingerprint(view.folder)
    except SdloraError as error:
        return ["", "", views.failure(error), *nothing]
    pages, taken_out, change = cards_by_page(view), editor.taken_out, editor.last_change
    page = str(wanted) if str(wanted) in pages else next(iter(pages))
    shown = context.studio.shown
    return [
        images, fingerprint, views.set_summary(view, asks_for=editor.folder if editor.needs_permission else None),
        gr.update(visible=editor.needs_permission),
        gr.update(visible=change is not None, value=f"Undo: {change.words}" if change else "Undo"),
        change.key if change else "",
        gr.update(visible=len(taken_out) > 1, value=f"Put all {len(taken_out)} images back"),
        views.duplicates(view, shown, images),
        gr.update(choices=list(pages), value=page, visible=len(pages) > 1),
        views.set_cards(pages[page], view.folder, shown, images, is_locked=editor.needs_permission),
    ]  # fmt: skip


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


def images_page(context: Context, live: Live) -> tuple[gr.Dropdown, ShownSet, gr.Button, Callable[..., None]]:
    """Lay out the page and connect its controls.

    Returns:
        The choice of a set, what shows it, the button that leads on, and a function that connects what needs the
        trigger, whose component is on another page.
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
    note = live.add_note("pictures-note")
    summary = gr.HTML(elem_id="set-summary")
    with gr.Row():
        allow = gr.Button("Allow saving in this folder", visible=False, min_width=200, elem_id="allow-saving")
        undo = gr.Button("Undo", visible=False, min_width=200, elem_id="undo")
        put_back = gr.Button("Put all images back", visible=False, min_width=200, elem_id="put-back")
    onward = gr.Button("Next: the recipe", variant="primary", elem_id="to-recipe")
    shown = ShownSet(
        images=gr.Textbox(visible=False), fingerprint=gr.Textbox(visible=False), summary=summary, allow=allow,
        undo=undo, change=gr.Textbox(visible=False), put_back=put_back, duplicates=gr.HTML(elem_id="duplicates"),
        page=gr.Dropdown([], label="Images shown", visible=False, elem_id="cards-page", render=False),
        cards=gr.HTML("", elem_id="cards", render=False, html_template=_CARDS, js_on_load=_DRAW_CARDS),
    )  # fmt: skip
    parts = shown.all()
    with gr.Accordion("Edit or write all captions at once", open=False, elem_id="all-captions"):
        connect_trigger = _caption_editor(context, shown, note)
        caption_controls(context, live, shown.images)
    shown.page.render()  # type: ignore[no-untyped-call]
    shown.cards.render()  # type: ignore[no-untyped-call]
    refresh = gr.Button(elem_id="refresh-set", visible="hidden")
    live.parts["listing"] = listing = gr.Textbox(visible=False, elem_id="listing")

    def choose(images: str | None, before: str) -> list[Any]:
        if before and images == before:  # told twice, by the Enter key and as the field is left
            return [gr.skip() for _ in (note, *parts)]
        found = show(context, (images or "").strip())
        if found[0] or not images:
            write_draft(context.studio, context.draft().with_images(found[0]))
        return ["", *found]

    def show_page(images: str, chosen: str | None) -> list[Any]:
        return show(context, images, chosen)

    def follow(images: str, chosen: str | None, now: str, drawn: str) -> list[Any]:
        """Show images that came or went by another way than this tab's."""
        # There is nothing to follow before this tab was asked about its set.
        return [gr.skip() for _ in parts] if now in ("", drawn) else show(context, images, chosen)

    def show_around(images: str, chosen: str | None, drawn: str) -> list[Any]:
        """Show what a saved caption changes around the cards, which are as they should be unless images changed."""
        found = show(context, images, chosen)
        return ["", *found[:-1], gr.skip()] if found[1] == drawn else ["", *found]

    def show_when_captioned(images: str, chosen: str | None) -> list[Any]:
        task = context.tasks.find("caption")
        ended = task is not None and context.tasks.stage(task) != "running"
        return show_page(images, chosen) if ended and images else [gr.skip() for _ in parts]

    def change(action: Callable[..., str]) -> Callable[..., list[Any]]:
        """Change the shown set, given an action on its editor, and show it again."""

        def changed(images: str, chosen: str | None, *more: Any) -> list[Any]:
            message = context.attempt(lambda: action(context.editor(images), *more))
            return [message, *show(context, images, chosen)]

        return changed

    def allow_saving(editor: SetEditor) -> str:
        editor.allow_writing()
        return f"Captions and added images are saved in {editor.folder} from now on. Nothing there is ever deleted."

    for upload in (drop, whole):
        upload.upload(lambda *values: _add(context, *values), [upload, choice], [note, choice, upload, *parts])
    choice.input(choose, [choice, shown.images], [note, *parts], show_progress="hidden")
    looked_at = [shown.images, shown.page]
    shown.page.input(show_page, looked_at, parts, show_progress="hidden", **ANY_VALUE)
    # Outside of the queue, whose stream would be cut off by every reload.
    live.parts["caption"].change(
        show_when_captioned, looked_at, parts, show_progress="hidden", queue=False, **ANY_VALUE
    )
    follows = [*looked_at, listing, shown.fingerprint]
    listing.change(follow, follows, parts, show_progress="hidden", queue=False, **ANY_VALUE)
    refresh.click(
        show_around, [*looked_at, shown.fingerprint], [note, *parts], show_progress="hidden", queue=False, **ANY_VALUE
    )
    allow.click(change(allow_saving), looked_at, [note, *parts], **ANY_VALUE)
    undo.click(change(SetEditor.undo), [*looked_at, shown.change], [note, *parts], **ANY_VALUE)
    put_back.click(change(SetEditor.put_all_back), looked_at, [note, *parts], **ANY_VALUE)
    return choice, shown, onward, connect_trigger


def _add(context: Context, files: list[str] | None, images: str | None) -> list[Any]:
    """Take uploaded files into the chosen set, or into a new one if none is chosen."""
    chosen = (images or "").strip() or _NEW_SET
    is_added = False

    def action() -> str:
        nonlocal is_added
        uploaded = [Path(file) for file in files or []]
        try:
            folder = context.editor(chosen).writable()
            intake = store_upload([(file.name, file) for file in uploaded], folder)
        finally:
            for file in uploaded:
                file.unlink(missing_ok=True)
                # Gradio makes a folder for every file; a shared one goes with its last file.
                with suppress(OSError):
                    file.parent.rmdir()
        is_added = True
        write_draft(context.studio, context.draft().with_images(chosen))
        added = f"{len(intake.images)} images and {intake.num_captions} captions were added."
        return "\n".join([added, *(f"Left out: {reason}" for reason in intake.refused)])

    message = context.attempt(action)
    choice = gr.update(choices=context.sets(), value=chosen if is_added else images)
    return [message, choice, None, *show(context, chosen if is_added or images else "")]


def _caption_editor(context: Context, shown: ShownSet, note: gr.HTML) -> Callable[[gr.Textbox], None]:
    """Lay out what changes all captions of the set; returns what connects the button of the trigger word."""
    with gr.Row(elem_classes="ends"):
        find = gr.Textbox(label="Find", min_width=160)
        replacement = gr.Textbox(label="Replace with", min_width=160)
        replace_all = gr.Button("Replace in all captions", min_width=160)
    with gr.Row(elem_classes="ends"):
        caption = gr.Textbox(label="Caption for images without one", min_width=260)
        fill = gr.Button("Use it for all of them", min_width=200)
        add_trigger = gr.Button("Add the trigger word to all captions", min_width=200)

    def on_click(button: gr.Button, edit: Callable[..., dict[str, str]], done: str, *words: gr.Textbox) -> None:
        def change(images: str, chosen: str | None, *texts: str | None) -> list[Any]:
            def action() -> str:
                editor = context.editor(images)
                view = image_set.view(editor.writable(), taken_out=editor.taken_out)
                captions = edit(view, *(text or "" for text in texts))
                editor.change_captions(captions, f"{len(captions)} {done}")
                return f"{len(captions)} {done}."

            return [context.attempt(action), *show(context, images, chosen)]

        button.click(change, [shown.images, shown.page, *words], [note, *shown.all()], **ANY_VALUE)

    on_click(replace_all, image_set.replace_words, "captions were changed", find, replacement)
    on_click(fill, image_set.fill_missing_captions, "images got this caption", caption)
    return lambda trigger: on_click(add_trigger, image_set.prepend_trigger, "captions were changed", trigger)
