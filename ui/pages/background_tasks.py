"""The controls of background tasks: captions by a model, and a run's upload to the Hub.

Both are commands of the command line in a process of their own, which these controls start, stop and report on.
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

_EXAMPLE_MODEL = "Salesforce/blip-image-captioning-base"


@dataclass(frozen=True)
class TaskControls:
    """The controls that show a background task.

    Attributes:
        status: How the task stands, from the snapshot.
        end: Stops the task, or hides the status of one that has ended.
        note: What became of the last click.
        events: Clicks after which the page is refreshed.
    """

    status: gr.HTML
    end: gr.Button
    note: gr.HTML
    events: list[Any]


def _task_controls(context: Context, kind: Kind) -> TaskControls:
    note = gr.HTML(elem_id=f"{kind}-note")
    status = gr.HTML(elem_id=f"{kind}-told")
    end = gr.Button("Stop", min_width=110, elem_id=f"{kind}-end", visible=False)

    def end_task() -> str:
        return context.attempt(lambda: context.tasks.end(kind))

    return TaskControls(status, end, note, [end.click(end_task, None, note)])


# --- Captions ---------------------------------------------------------------------------------------------------------


def caption_controls(context: Context) -> TaskControls:
    """Lay out the controls of captions by a model."""
    with gr.Row(elem_classes="ends"):
        model = gr.Textbox(
            label="Captioning model", min_width=260, scale=2, max_lines=1, elem_id="captioner",
            placeholder=_EXAMPLE_MODEL,
            info="A hub id, or the folder of an image-to-text model. Existing captions are kept.",
        )  # fmt: skip
        ask = gr.Button("Caption the remaining images", min_width=160, elem_id="ask-captions")
    controls = _task_controls(context, "caption")
    clicked = ask.click(lambda name: context.attempt(lambda: start_captioning(context, name)), model, controls.note)
    controls.events.append(clicked)
    return controls


def start_captioning(context: Context, model: str | None) -> str:
    """Let a model caption every image of the draft's set that has no caption; returns the message to show.

    Raises:
        SdloraError: There is no such set or folder, its images have faults, or captions are being written already.
    """
    images, wanted = context.draft().images, (model or "").strip()
    if not wanted:
        raise StudioError(
            f"Name the captioning model: a hub id such as {_EXAMPLE_MODEL}, or the folder of an image-to-text model."
        )
    path = Path(wanted).expanduser()
    if path.exists():
        wanted = str(context.studio.allowed(path).absolute())
    elif path.is_absolute() or wanted.startswith((".", "~")):
        raise StudioError(f"There is no folder {wanted!r}. Check the spelling, or use a hub id such as owner/name.")
    folder = context.own_folder(images).absolute()
    rest = images_to_caption(folder, overwrite=False)
    if not rest:
        return "Every image has a caption already. Clear a caption to have it rewritten."
    files = [image.with_suffix(".txt") for image in rest]
    context.tasks.start("caption", images, ["caption", str(folder), f"--model={wanted}"], files)
    return ""


# --- Publishing -------------------------------------------------------------------------------------------------------


def publish_controls(context: Context, run: gr.Dropdown) -> TaskControls:
    """Lay out the controls that upload the chosen run, after a confirmation."""
    repo = gr.Textbox(
        label="Publish on the Hugging Face Hub as", placeholder="your-name/zumi-lora", max_lines=1, elem_id="repo"
    )
    with gr.Row(elem_classes="ends"):
        private = gr.Checkbox(True, label="Private: only you can see it", min_width=230, elem_id="private")
        publish = gr.Button("Publish …", min_width=120, elem_id="publish")
    with gr.Row(visible=False) as confirmation:
        confirm = gr.Button("Publish it", variant="primary", elem_id="really-publish")
        cancel = gr.Button("Not now", elem_id="not-now")
    controls = _task_controls(context, "publish")
    asked = gr.Textbox(visible=False)  # the chosen run may be gone by then, and another one chosen instead
    question = [controls.note, confirmation]

    def ask(name: Any, repository: str, is_private: bool) -> list[Any]:
        try:
            text = _question(context, name, repository, is_private)
        except SdloraError as error:
            return [views.failure(error), gr.update(visible=False), ""]
        return [views.message(text, "watch", title=f"Publish {name}?"), gr.update(visible=True), name]

    def upload(name: Any, repository: str, is_private: bool) -> list[Any]:
        message = context.attempt(lambda: _start_upload(context, name, repository, is_private))
        return [message, gr.update(visible=False)]

    def dismiss() -> list[Any]:
        return ["", gr.update(visible=False)]

    publish.click(ask, [run, repo, private], [*question, asked])
    cancel.click(dismiss, None, question, show_progress="hidden")
    # What is confirmed is what is shown: another name or another run is another question.
    gr.on([repo.input, private.input, run.input], dismiss, None, question, show_progress="hidden")
    controls.events.append(confirm.click(upload, [asked, repo, private], question))
    return controls


def _question(context: Context, name: Any, repository: str, is_private: bool) -> str:
    address = f"https://huggingface.co/{_repository(repository)}"
    audience = "visible to you alone" if is_private else "visible to everyone"
    files = ", ".join(files_to_upload(context, name))
    return f"It will be at {address}, {audience}.\nThese files are uploaded: {files}."


def _start_upload(context: Context, name: Any, repository: str, is_private: bool) -> None:
    files_to_upload(context, name)
    folder = context.studio.run(name).absolute()
    public = [] if is_private else ["--public"]
    context.tasks.start("publish", name, ["push", str(folder), f"--repo={_repository(repository)}", *public])


def files_to_upload(context: Context, name: Any) -> list[str]:
    """The files of a run that are uploaded.

    Raises:
        SdloraError: The run is not done, or nobody is logged in to the Hub.
    """
    word = context.jobs.status(need(name)).word
    if word != "done":
        raise StudioError(f"{name!r} is not done ({WORDS[word]}). Let it finish before you publish it.")
    # Only whether there is a token is checked here: the upload reads it from where `hf auth login` put it.
    if get_token() is None:
        raise StudioError(
            "You are not logged in to the Hugging Face Hub. Run 'hf auth login' in a terminal on the machine where the "
            "studio runs, then press Publish again."
        )
    return files_to_push(RunFolder(context.studio.run(name), run_view.settings_of(context.studio, name).name or "lora"))


def _repository(text: str) -> str:
    repository = text.strip()
    try:
        validate_repo_id(repository)
    except HFValidationError:
        repository = ""
    if repository.count("/") != 1:
        raise StudioError(
            f"{text.strip()!r} is not a repository on the Hub; use OWNER/NAME, such as your-name/zumi-lora."
        )
    return repository
