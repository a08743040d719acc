"""The page of images: they are uploaded, checked by the doctor, and captioned.

Every handler acts on the set that its own tab shows, which travels with the event; the draft only remembers the last
choice for tabs that are opened later.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import gradio as gr

from sdlora.common.bundled import BUILTIN
from sdlora.common.remote import is_url
from sdlora.errors import SdloraError

from ..html import views
from ..html.render import render
from ..settings.bases import POCKET
from ..settings.draft import Draft, write_draft
from ..settings.recipes import LENGTHS, SUBJECTS
from ..state import card_filter
from ..state.card_filter import ALL
from ..state.image_set import Card
from ..state.locations import check_location
from ..state.set_editor import SetEditor
from ..state.uploads import store_upload
from .background_tasks import caption_controls
from .caption_editor import caption_editor
from .context import ANY_VALUE, Context, Live, failure

MAX_CARDS = 48
_NEW_SET = "my images"
_TRIAL = "zumi"  # the shipped set that a new user tries everything on, and its trigger
_KINDS = ["image", ".txt", ".caption", ".json", ".jsonl", ".zip"]
_PROGRESS = gr.Progress()
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
    only: gr.Dropdown  # which of its images are shown
    page: gr.Dropdown
    fingerprint: gr.Textbox  # of the images as they are shown
    summary: gr.HTML
    allow: gr.Button
    undo: gr.Button
    change: gr.Textbox  # what the undo button undoes
    put_back: gr.Button
    duplicates: gr.HTML
    cards: gr.HTML
    trial: gr.Button

    def all(self) -> list[gr.components.Component]:
        """All of them."""
        return [*vars(self).values()]

    def looked_at(self) -> list[gr.components.Component]:
        """What says which images are shown, as `show` takes it."""
        return [self.images, self.only, self.page]


PARTS = [field.name for field in fields(ShownSet)]
"""The names of the components that `show` fills, in their order."""


def show(
    context: Context, images: str, only: str | None = None, wanted: str | None = None, trigger: str | None = None
) -> list[Any]:
    """The values of a `ShownSet`.

    Args:
        context: The studio.
        images: The set that is chosen; empty if none is.
        only: Which images are shown; see `card_filter`.
        wanted: A page of them, by its label; the first one if there is no such page.
        trigger: The trigger word; the draft's if None.
    """
    hidden = gr.update(visible=False)
    nothing = [hidden, hidden, "", hidden, "", ""]
    images = _text(images)  # handlers take any value
    if not images:
        summary = views.start_page(context.studio.shown)
        return ["", gr.update(value=ALL, visible=False), hidden, "", summary, *nothing, gr.update(visible=True)]
    try:
        if is_url(images):
            check_location(context.studio, images)
            told = views.message("They are downloaded when the run starts.", title=images)
            return [images, hidden, hidden, "", told, *nothing, hidden]
        editor = context.editor(images)
        draft = context.draft().with_images(images)
        # Before the images are looked at: one that comes or goes meanwhile makes the page look again.
        fingerprint = context.fingerprint(images)
        view = context.view_set(draft if trigger is None else draft.with_value("data.trigger", trigger or None))
    except SdloraError as error:
        return ["", hidden, hidden, "", failure(error), *nothing, hidden]
    taken_out, change, choices = editor.taken_out, editor.last_change, card_filter.choices(view)
    is_known = not str(only).startswith(("finding:", "tag:")) or only in [key for _, key in choices]
    only = str(only or ALL) if is_known else ALL
    pages = cards_by_page(card_filter.chosen(view, only))
    page = str(wanted) if str(wanted) in pages else next(iter(pages))
    shown = context.studio.shown
    return [
        images, gr.update(choices=choices, value=only, visible=bool(view.cards)),
        gr.update(choices=list(pages), value=page, visible=len(pages) > 1),
        fingerprint, views.set_summary(view, asks_for=editor.folder if editor.needs_permission else None),
        gr.update(visible=editor.needs_permission),
        gr.update(visible=change is not None, value=f"Undo: {change.words}" if change else "Undo"),
        change.key if change else "",
        gr.update(visible=len(taken_out) > 1, value=f"Put all {len(taken_out)} images back"),
        views.duplicates(view, shown, images),
        views.set_cards(pages[page], view.folder, shown, images, is_locked=editor.needs_permission),
        hidden,
    ]  # fmt: skip


def cards_by_page(cards: Sequence[Card]) -> dict[str, Sequence[Card]]:
    """Cards in pages small enough for a browser, by label."""
    return {
        f"{first + 1} to {min(first + MAX_CARDS, len(cards))} of {len(cards)}": cards[first : first + MAX_CARDS]
        for first in range(0, max(1, len(cards)), MAX_CARDS)
    }


def _text(value: Any) -> str:
    return str(value or "").strip()


def start_trial(context: Context) -> str:
    """Start a first run on a shipped set and the built-in base model, as it is; returns its name."""
    draft = Draft(images=BUILTIN + _TRIAL).with_answers(SUBJECTS[0], next(iter(LENGTHS)), POCKET)
    name = context.free_name(f"{_TRIAL} trial")
    config = replace(draft.with_value("data.trigger", _TRIAL), name=name).config(context.studio)
    context.jobs.add(config)
    return name


def images_page(context: Context, live: Live, tabs: gr.Tabs) -> tuple[gr.Dropdown, ShownSet, gr.Textbox, gr.Button]:
    """Lay out the page and connect its controls.

    Args:
        context: The studio.
        live: What is kept up to date.
        tabs: The pages, of which starting a trial leads to another.

    Returns:
        The choice of a set, what shows it, the trigger word, which belongs to the recipe, and the button that leads on.
    """
    with gr.Row(equal_height=True):
        drop = gr.File(
            label="Drop images, captions (.txt, .caption, .json), a folder or a zip of them here",
            file_count="multiple", file_types=_KINDS, height=150, scale=3, elem_id="drop",
        )  # fmt: skip
        with gr.Column(scale=2, min_width=260):
            choice = gr.Dropdown(
                label="Set of images", allow_custom_value=True, elem_id="set",
                info="Choose a set, type a name for a new one, or enter a folder of this machine.",
            )  # fmt: skip
            gr.HTML(render("folder.html"))
    note = live.add_note("pictures-note")
    summary = gr.HTML(elem_id="set-summary")
    trial = gr.Button("Try it with zumi", visible=False, variant="primary", elem_id="try-zumi")
    with gr.Row():
        allow = gr.Button("Allow saving in this folder", visible=False, min_width=200, elem_id="allow-saving")
        undo = gr.Button("Undo", visible=False, min_width=200, elem_id="undo")
        put_back = gr.Button("Put all images back", visible=False, min_width=200, elem_id="put-back")
    twins = gr.HTML(elem_id="duplicates")
    with gr.Row(elem_classes="ends"):
        trigger = gr.Textbox(
            label="Trigger word", elem_id="trigger", max_lines=1, min_width=260, scale=2,
            info="An invented word for what it learns, such as zumi. Words with a meaning work less well.",
        )  # fmt: skip
        add_trigger = gr.Button("Add the trigger word to all captions …", min_width=200)
        onward = gr.Button("Next: the recipe", variant="primary", min_width=160, elem_id="to-recipe")
    shown = ShownSet(
        images=gr.Textbox(visible=False), fingerprint=gr.Textbox(visible=False), summary=summary, allow=allow,
        undo=undo, change=gr.Textbox(visible=False), put_back=put_back, duplicates=twins,
        only=gr.Dropdown(
            [("All images", ALL)], value=ALL, label="Show", visible=False, allow_custom_value=True, min_width=220,
            elem_id="cards-only", render=False, info="Choose a finding or a tag, or type words of captions.",
        ),
        page=gr.Dropdown([], label="Images shown", visible=False, min_width=220, elem_id="cards-page", render=False),
        cards=gr.HTML("", elem_id="cards", render=False, html_template=_CARDS, js_on_load=_DRAW_CARDS), trial=trial,
    )  # fmt: skip
    parts, looked_at = shown.all(), shown.looked_at()
    caption_editor(context, live, looked_at, parts, trigger, add_trigger, show)
    with gr.Accordion("Have a model write captions", open=False, elem_id="model-captions"):
        caption_controls(context, live, shown.images)
    with gr.Row():
        for one in (shown.only, shown.page):
            one.render()  # type: ignore[no-untyped-call]
    shown.cards.render()  # type: ignore[no-untyped-call]
    refresh = gr.Button(elem_id="refresh-set", visible="hidden")
    asked = gr.Textbox(visible=False)
    live.parts["listing"] = listing = gr.Textbox(visible=False, elem_id="listing")

    def choose(images: str | None, before: str) -> list[Any]:
        wanted = _text(images)
        if wanted == before:  # told twice, by the Enter key and as the field is left
            return [gr.skip() for _ in (note, *parts)]
        found = show(context, wanted)
        if found[0] or not wanted:
            write_draft(context.studio, context.draft().with_images(found[0]))
        return ["", *found]

    def show_chosen(*looked: str | None) -> list[Any]:
        return show(context, *looked)  # type: ignore[arg-type]

    def follow(images: str, only: str | None, page: str | None, now: str, drawn: str) -> list[Any]:
        """Show images that came or went by another way than this tab's, and tell which of them were asked for."""
        # There is nothing to follow before this tab was asked about its set.
        if str(now).partition(" ")[0] in ("", drawn):
            return [gr.skip() for _ in (*parts, asked)]
        found = show(context, images, only, page)
        for name, value in (("only", only), ("page", page)):
            update = found[PARTS.index(name)]
            if update.get("value") == value:  # left to the tab, where another may have been chosen since
                update.pop("value", None)
        return [*found, json.dumps([only, page])]

    def catch_up(images: str, only: str | None, page: str | None, shown_for: str) -> list[Any]:
        """Show what was chosen while the set was followed."""
        is_shown = _text(shown_for) in ("", json.dumps([only, page]))
        return [gr.skip() for _ in parts] if is_shown else show(context, images, only, page)

    def show_around(images: str, only: str | None, page: str | None, drawn: str, word: str) -> list[Any]:
        """Show what a saved caption changes around the cards, which are as they should be unless images changed."""
        found = show(context, images, only, page, _text(word))
        if found[PARTS.index("fingerprint")] == drawn:
            # Other cards may have been drawn since this was asked, and their fingerprint must stay with them.
            found[PARTS.index("cards")] = found[PARTS.index("fingerprint")] = gr.skip()
        return ["", *found]

    def show_with_trigger(images: str, only: str | None, page: str | None, word: str) -> list[Any]:
        return show(context, images, only, page, _text(word)) if images else [gr.skip() for _ in parts]

    def show_when_captioned(images: str, only: str | None, page: str | None) -> list[Any]:
        task = context.tasks.find("caption")
        ended = task is not None and context.tasks.stage(task) != "running"
        return show(context, images, only, page) if ended and images else [gr.skip() for _ in parts]

    def change(action: Callable[..., str]) -> Callable[..., list[Any]]:
        """Change the shown set, given an action on its editor, and show it again."""

        def changed(images: str, only: str | None, page: str | None, *more: Any) -> list[Any]:
            message = context.attempt(lambda: action(context.editor(images), *more))
            return [message, *show(context, images, only, page)]

        return changed

    def allow_saving(editor: SetEditor) -> str:
        editor.allow_writing()
        return f"Captions and added images are saved in {editor.folder} from now on. Nothing there is ever deleted."

    def add(files: list[str] | None, images: str | None, progress: gr.Progress = _PROGRESS) -> list[Any]:
        return _add(context, files, images, lambda done, total: progress((done, total), "Checking", unit="files"))

    def begin_trial() -> list[Any]:
        name = ""

        def action() -> None:
            nonlocal name
            name = start_trial(context)

        message = context.attempt(action)
        if not name:
            return [message, gr.skip(), gr.skip()]
        return [message, gr.Tabs(selected="training"), gr.update(choices=context.jobs.names(), value=name)]

    quiet: dict[str, Any] = {"show_progress": "hidden", "queue": False, **ANY_VALUE}
    drop.upload(add, [drop, choice], [note, choice, drop, *parts], show_progress_on=[drop])
    # Outside of the queue, which costs a second request, and whose stream would be cut off by every reload.
    gr.on([choice.input, choice.blur], choose, [choice, shown.images], [note, *parts], **quiet)
    gr.on([shown.only.input, shown.page.input], show_chosen, looked_at, parts, **quiet)
    live.parts["caption"].change(show_when_captioned, looked_at, parts, **quiet)
    followed = listing.change(follow, [*looked_at, listing, shown.fingerprint], [*parts, asked], **quiet)
    followed.then(catch_up, [*looked_at, asked], parts, **quiet)
    refresh.click(show_around, [*looked_at, shown.fingerprint, trigger], [note, *parts], **quiet)
    trigger.blur(show_with_trigger, [*looked_at, trigger], parts, **quiet)
    allow.click(change(allow_saving), looked_at, [note, *parts], **ANY_VALUE)
    undo.click(change(SetEditor.undo), [*looked_at, shown.change], [note, *parts], **ANY_VALUE)
    put_back.click(change(SetEditor.put_all_back), looked_at, [note, *parts], **ANY_VALUE)
    live.events.append(trial.click(begin_trial, None, [note, tabs, live.run], **ANY_VALUE))
    return choice, shown, trigger, onward


def _add(
    context: Context, files: list[str] | None, images: str | None, told: Callable[[int, int], object]
) -> list[Any]:
    """Take uploaded files into the chosen set, or into a new one if none is chosen."""
    chosen = _text(images) or _NEW_SET
    is_added = False

    def action() -> str:
        nonlocal is_added
        uploaded = [Path(file) for file in files or []]
        try:
            folder = context.editor(chosen).writable()
            intake = store_upload([(file.name, file) for file in uploaded], folder, told)
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
