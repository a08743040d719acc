"""The controls of background tasks: captions by a model, and a run's upload to the Hub.

Both are commands of the command line in a process of their own, which these controls start, stop and report on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr
from huggingface_hub import get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from sdlora.data.captioner import images_to_caption
from sdlora.errors import SdloraError
from sdlora.run.export import files_to_push
from sdlora.run.folder import RunFolder

from ..html import views
from ..html.render import WORDS
from ..state import run_view
from ..state.background_tasks import Kind
from ..state.folders import StudioError
from ..state.image_set import read_folder
from ..state.locations import check_model, to_path
from .context import ANY_VALUE, Context, Live, failure, need

# What captions are written as: the option of `sdlora caption`, and an example of its models.
_CAPTION_KINDS = {
    "sentences": ("model", "Salesforce/blip-image-captioning-base"),
    "booru tags": ("tagger", "SmilingWolf/wd-vit-tagger-v3"),
}
_SENTENCES = "sentences"


def _task_controls(context: Context, live: Live, kind: Kind) -> gr.HTML:
    """Lay out how a task stands and the button that ends it; returns where the last click's outcome is shown."""
    note = live.add_note(f"{kind}-note")
    live.parts[kind] = gr.HTML(elem_id=f"{kind}-told")
    live.parts[f"end {kind}"] = end = gr.Button("Stop", min_width=110, elem_id=f"{kind}-end", visible=False)
    live.events.append(end.click(lambda: context.attempt(context.tasks.end, kind), None, note))
    return note


# --- Captions ---------------------------------------------------------------------------------------------------------


def caption_controls(context: Context, live: Live, images: gr.Textbox) -> None:
    """Lay out the controls of captions by a model, for the set that `images` names."""
    with gr.Row(elem_classes="ends"):
        model = gr.Textbox(
            label="Captioning model", min_width=260, scale=2, max_lines=1, elem_id="captioner",
            placeholder=_CAPTION_KINDS[_SENTENCES][1],
            info="A hub id, or the folder of a model. Existing captions are kept.",
        )  # fmt: skip
        written_as = gr.Radio(
            [*_CAPTION_KINDS], value=_SENTENCES, label="Captions as", min_width=200, elem_id="captions-as",
            info="By an image-to-text model, or by a tagger of the WD14 family for bases prompted in tags.",
        )  # fmt: skip
        ask = gr.Button("Caption the remaining images", min_width=160, elem_id="ask-captions")
    note = _task_controls(context, live, "caption")
    written_as.input(
        lambda kind: gr.update(placeholder=_CAPTION_KINDS[kind][1]), written_as, model, show_progress="hidden"
    )
    live.events.append(
        ask.click(
            lambda *values: context.attempt(start_captioning, context, *values), [images, model, written_as], note
        )
    )


def start_captioning(context: Context, images: str, model: str | None, written_as: str = _SENTENCES) -> str:
    """Let a model caption every image of a set that has no caption; returns the message to show.

    Args:
        images: The set, as it was chosen.
        written_as: A key of `_CAPTION_KINDS`.

    Raises:
        SdloraError: There is no such set or folder, its images have faults, or captions are being written already.
    """
    wanted = (model or "").strip()
    option, example = _CAPTION_KINDS[written_as]
    if not wanted:
        raise StudioError(f"Name the captioning model: a hub id such as {example}, or the folder of a model.")
    check_model(context.studio, wanted)
    path = to_path(wanted)
    if path.exists():
        wanted = str(path.absolute())
    elif path.is_absolute() or wanted.startswith((".", "~")):
        raise StudioError(f"There is no folder {wanted!r}. Check the spelling, or use a hub id such as owner/name.")
    for one in read_folder(context.editor(images).writable()).sets:
        # A task writes the captions of one folder; the next of kohya's folders is another task.
        if rest := images_to_caption(Path(one.folder), overwrite=False):
            files = [image.with_suffix(".txt") for image in rest]
            command = ["caption", str(Path(one.folder).absolute()), f"--{option}={wanted}"]
            context.tasks.start("caption", images, command, files)
            return ""
    return "Every image has a caption already. Clear a caption to have it rewritten."


# --- Publishing -------------------------------------------------------------------------------------------------------


def publish_controls(context: Context, live: Live) -> None:
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
    note = _task_controls(context, live, "publish")
    asked = gr.Textbox(visible=False)  # the chosen run may be gone by then, and another one chosen instead

    def ask(name: Any, text: str, is_private: bool) -> list[Any]:
        try:
            repository, files = _repository(text), ", ".join(files_to_upload(context, name))
        except SdloraError as error:
            return [failure(error), gr.update(visible=False), ""]
        audience = "visible to you alone" if is_private else "visible to everyone"
        question = f"It will be at https://huggingface.co/{repository}, {audience}.\nThese files are uploaded: {files}."
        return [views.message(question, "watch", title=f"Publish {name}?"), gr.update(visible=True), name]

    def upload(name: Any, text: str, is_private: bool) -> None:
        files_to_upload(context, name)
        command = ["push", str(context.studio.run(name).absolute()), f"--repo={_repository(text)}"]
        context.tasks.start("publish", name, command if is_private else [*command, "--public"])

    def dismiss() -> list[Any]:
        return ["", gr.update(visible=False)]

    publish.click(ask, [live.run, repo, private], [note, confirmation, asked], **ANY_VALUE)
    cancel.click(dismiss, None, [note, confirmation], show_progress="hidden")
    # What is confirmed is what is shown: another name or another run is another question.
    changes = [repo.input, private.input, live.run.input]
    gr.on(changes, dismiss, None, [note, confirmation], show_progress="hidden", queue=False)
    live.events.append(
        confirm.click(
            lambda *values: [context.attempt(upload, *values), gr.update(visible=False)],
            [asked, repo, private], [note, confirmation],
        )
    )  # fmt: skip


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
