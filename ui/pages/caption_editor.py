"""The controls that change all captions of a set: what each would change is shown first, and done when it is confirmed.

Part of the page of images.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import gradio as gr

from sdlora.errors import SdloraError

from ..html import views
from ..state import caption_edits, image_set
from ..state.caption_edits import CaptionEdit
from ..state.folders import StudioError
from .context import ANY_VALUE, Context, Live, failure

_EDITS: dict[str, Callable[..., CaptionEdit]] = {
    "replace": caption_edits.replace_words,
    "fill": caption_edits.fill_missing_captions,
    "trigger": caption_edits.prepend_trigger,
}
_NOTHING = "No caption would change."
_STALE = "The captions were changed in the meantime. This is what would change now: look at it, and confirm again."


def propose(context: Context, images: str, kind: str, *texts: str | None) -> tuple[str, CaptionEdit | None]:
    """What a change of all captions would do.

    Args:
        context: The studio.
        images: The set.
        kind: A key of `_EDITS`.
        texts: What that takes.

    Returns:
        What to show as HTML, and the change; None if there is nothing to confirm.
    """
    try:
        edit = _edit(context, images, kind, texts)
    except SdloraError as error:
        return failure(error), None
    if not edit.captions:
        return views.message(_NOTHING, "watch"), None
    return views.caption_changes(edit), edit


def _edit(context: Context, images: str, kind: str, texts: tuple[str | None, ...]) -> CaptionEdit:
    editor = context.editor(images)
    view = image_set.view(editor.writable(), taken_out=editor.taken_out)
    return _EDITS[kind](view, *(text or "" for text in texts))


def apply(context: Context, planned: str) -> tuple[str, CaptionEdit | None]:
    """Do what was proposed, if it is still the same; returns as `propose`.

    Args:
        context: The studio.
        planned: A JSON object of the arguments of `propose`, and the fingerprint of the change.
    """
    plan, again = _read_plan(planned), ""

    def action() -> str:
        nonlocal again
        if "fingerprint" not in plan:
            raise StudioError("There is nothing to confirm. Press the button of the change again.")
        edit = _edit(context, plan["images"], plan["kind"], tuple(plan["texts"]))
        if edit.fingerprint != plan["fingerprint"]:
            again = edit.fingerprint
            return _STALE
        number = len(edit.captions)
        words = "1 caption was changed" if number == 1 else f"{number} captions were changed"
        context.editor(plan["images"]).change_captions(edit.after, words)
        return f"{words}. “Undo”, above the images, takes it back."

    message = context.attempt(action)
    if not again:
        return message, None
    shown, edit = propose(context, plan["images"], plan["kind"], *plan["texts"])
    return f"{message}{shown}", edit


def _read_plan(planned: Any) -> dict[str, Any]:
    """What a note is about, as the page sends it; without a set if it is about nothing."""
    try:
        found = json.loads(planned)
    except (TypeError, ValueError):
        found = None
    is_plan = isinstance(found, dict) and isinstance(found.get("images"), str) and found.get("kind", "fill") in _EDITS
    return found if is_plan else {"images": ""}


def caption_editor(
    context: Context,
    live: Live,
    looked_at: list[Any],
    parts: list[Any],
    trigger: gr.Textbox,
    add_trigger: gr.Button,
    show: Callable[..., list[Any]],
) -> None:
    """Lay out the controls and connect them.

    Args:
        context: The studio.
        live: What is kept up to date.
        looked_at: The components that say what is shown, the set first.
        parts: The components that show the set.
        trigger: The trigger word.
        add_trigger: The button that puts it in front of all captions.
        show: Gives the values of `parts` for what is looked at.
    """
    with gr.Accordion("Edit all captions at once", open=False, elem_id="all-captions"):
        with gr.Row(elem_classes="ends"):
            find = gr.Textbox(label="Find", min_width=160)
            replacement = gr.Textbox(label="Replace with", min_width=160)
            replace_all = gr.Button("Replace in all captions …", min_width=160)
        with gr.Row(elem_classes="ends"):
            caption = gr.Textbox(label="Caption for images without one", min_width=260)
            fill = gr.Button("Use it for all of them …", min_width=200)
    note = live.add_note("captions-note")
    with gr.Row(visible=False) as confirmation:
        confirm = gr.Button("Change them", variant="primary", min_width=160, elem_id="apply-captions")
        cancel = gr.Button("Leave them", min_width=160, elem_id="leave-captions")
    planned = gr.Textbox(visible=False)  # what the note is about, as JSON
    asked = [note, confirmation, confirm, planned]
    images = looked_at[0]

    def answer(plan: dict[str, Any], message: str, edit: CaptionEdit | None) -> list[Any]:
        if edit is None:
            return [message, gr.update(visible=False), gr.skip(), json.dumps({"images": plan["images"]})]
        number = len(edit.captions)
        label = f"Change {number} caption{'' if number == 1 else 's'}"
        plan = {**plan, "fingerprint": edit.fingerprint}
        return [message, gr.update(visible=True), gr.update(value=label), json.dumps(plan)]

    def on_click(button: gr.Button, kind: str, *words: gr.Textbox) -> None:
        def ask(images: str, *texts: str | None) -> list[Any]:
            plan = {"images": images, "kind": kind, "texts": texts}
            return answer(plan, *propose(context, images, kind, *texts))

        button.click(ask, [images, *words], asked)

    def confirmed(plan: str, *looked: Any) -> list[Any]:
        return [*answer(_read_plan(plan), *apply(context, plan)), *show(context, *looked)]

    def dismiss() -> list[Any]:
        return ["", gr.update(visible=False), gr.skip(), ""]

    def follow(images: str, plan: str) -> list[Any]:
        """What is confirmed is what is shown: another set is another question."""
        is_same = not plan or _read_plan(plan)["images"] == images
        return [gr.skip() for _ in asked] if is_same else dismiss()

    on_click(replace_all, "replace", find, replacement)
    on_click(fill, "fill", caption)
    on_click(add_trigger, "trigger", trigger)
    confirm.click(confirmed, [planned, *looked_at], [*asked, *parts], **ANY_VALUE)
    cancel.click(dismiss, None, asked, show_progress="hidden")
    images.change(follow, [images, planned], asked, show_progress="hidden", queue=False)
