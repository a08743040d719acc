"""The parts of the pages that send for something: captions by a model, and a run's upload to the Hub.

Both are commands of the command line in a process of their own; here they are asked for and told of.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from huggingface_hub import get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from sdlora.data.captioner import images_to_caption
from sdlora.errors import SdloraError
from sdlora.run.folder import RunFolder
from sdlora.run.push import files_to_push

from ..html import views
from ..html.words import WORDS
from ..state import run_view
from ..state.background_tasks import Kind
from ..state.folders import StudioError
from .context import Context, need


@dataclass(frozen=True)
class TaskPart:
    """The parts that are filled from a snapshot.

    Attributes:
        told: How the background task stands.
        end: Stops it, or puts away what is told.
        moves: The clicks that change what there is to see.
    """

    told: gr.HTML
    end: gr.Button
    moves: list[Any]


def caption_part(context: Context) -> TaskPart:
    """Lay out what asks a model for captions."""
    with gr.Row(elem_classes="ends"):
        model = gr.Textbox(
            label="Model that writes captions", min_width=260, scale=2, max_lines=1, elem_id="captioner",
            placeholder="Salesforce/blip-image-captioning-base",
            info="A hub id, or the folder of an image-to-text model. Captions that are there stay as they are.",
        )  # fmt: skip
        ask = gr.Button("Let the model caption the rest", min_width=160, elem_id="ask-captions")
    note, part = _told_of(context, "caption")
    moved = ask.click(lambda words: context.attempt(lambda: send_for_captions(context, words)), model, note)
    return TaskPart(part.told, part.end, [moved, *part.moves])


def send_for_captions(context: Context, model: str | None) -> str:
    """Let a model caption every image of the draft's set that has no caption.

    Raises:
        SdloraError: There is no such set or folder, its images have faults, or captions are being written already.
    """
    images, wanted = context.draft().images, (model or "").strip()
    if not wanted:
        raise StudioError(
            "Say which model is to write the captions: a hub id such as Salesforce/blip-image-captioning-base, or a "
            "folder of an image-to-text model."
        )
    place = Path(wanted).expanduser()
    if place.exists():
        wanted = str(context.studio.allowed(place).absolute())
    elif place.is_absolute() or wanted.startswith((".", "~")):
        raise StudioError(f"There is no folder {wanted!r}. Check its spelling, or give a hub id such as owner/name.")
    folder = context.own_folder(images).absolute()
    rest = images_to_caption(folder, overwrite=False)
    if not rest:
        return "Every image has a caption already. Clear one to have it written anew."
    files = [image.with_suffix(".txt") for image in rest]
    context.tasks.start("caption", images, ["caption", str(folder), f"--model={wanted}"], files)
    return ""


def publish_part(context: Context, run: gr.Dropdown) -> TaskPart:
    """Lay out what uploads the chosen run, which asks once more before it does."""
    repo = gr.Textbox(
        label="Publish on the Hugging Face Hub as", placeholder="your-name/zumi-lora", max_lines=1, elem_id="repo"
    )
    with gr.Row(elem_classes="ends"):
        private = gr.Checkbox(True, label="Private: only you see it", min_width=230, elem_id="private")
        publish = gr.Button("Publish …", min_width=120, elem_id="publish")
    with gr.Row(visible=False) as sure:
        really = gr.Button("Publish it", variant="primary", elem_id="really-publish")
        keep = gr.Button("Not now", elem_id="not-now")
    note, part = _told_of(context, "publish")
    asked = gr.Textbox(visible=False)  # the chosen run may be gone by then, and another one chosen instead

    def ask(name: Any, words: str, alone: bool) -> list[Any]:
        try:
            told = f"{_address(words)}, {'seen by you alone' if alone else 'for everyone to see'}."
            told += f"\nThese files go there: {', '.join(files_of(context, name))}."
        except SdloraError as error:
            return [views.failure(error), gr.update(visible=False), ""]
        return [views.message(told, "watch", title=f"Publish {name}?"), gr.update(visible=True), name]

    def go(name: Any, words: str, alone: bool) -> list[Any]:
        def sent() -> str:
            files_of(context, name)
            folder, repository = context.studio.run(name).absolute(), _repository(words)
            command = ["push", str(folder), f"--repo={repository}", *([] if alone else ["--public"])]
            context.tasks.start("publish", name, command)
            return ""

        return [context.attempt(sent), gr.update(visible=False)]

    away = lambda: ["", gr.update(visible=False)]  # noqa: E731
    publish.click(ask, [run, repo, private], [note, sure, asked])
    keep.click(away, None, [note, sure], show_progress="hidden")
    # What was agreed to is what is seen: another name or another run is asked for anew.
    gr.on([repo.input, private.input, run.input], away, None, [note, sure], show_progress="hidden")
    moved = really.click(go, [asked, repo, private], [note, sure])
    return TaskPart(part.told, part.end, [moved, *part.moves])


def files_of(context: Context, name: Any) -> list[str]:
    """What of a run is uploaded.

    Raises:
        SdloraError: It is not done, or nobody is logged in to the Hub.
    """
    word = context.jobs.status(need(name)).word
    if word != "done":
        raise StudioError(f"{name!r} is not done ({WORDS[word]}). Let it finish first; then it can be published.")
    # It is only seen whether there is one: the upload reads it from where `hf auth login` put it.
    if get_token() is None:
        raise StudioError(
            "You are not logged in to the Hugging Face Hub. On the machine where the studio runs, type 'hf auth login' "
            "in a terminal; then press Publish again."
        )
    return files_to_push(RunFolder(context.studio.run(name), run_view.settings_of(context.studio, name).name or "lora"))


def _repository(words: str) -> str:
    repository = words.strip()
    try:
        validate_repo_id(repository)
    except HFValidationError:
        repository = ""
    if repository.count("/") != 1:
        raise StudioError(f"{words.strip()!r} is no place on the Hub. It is like your-name/zumi-lora.")
    return repository


def _address(words: str) -> str:
    return f"It becomes https://huggingface.co/{_repository(words)}"


def _told_of(context: Context, kind: Kind) -> tuple[gr.HTML, TaskPart]:
    note = gr.HTML(elem_id=f"{kind}-note")
    told = gr.HTML(elem_id=f"{kind}-told")
    end = gr.Button("Stop", min_width=110, elem_id=f"{kind}-end", visible=False)

    def ended() -> str:
        context.tasks.end(kind)
        return ""

    over = lambda: context.attempt(ended)  # noqa: E731
    return note, TaskPart(told, end, [end.click(over, None, note)])
