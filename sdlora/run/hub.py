"""What the Hub gets of a run: the model card, and the upload of it with the LoRA file and the previews on it.

Written by `run` at its end; it reveals captions, folders and file names only if `file.include_captions` is set. Sent by
`sdlora push`: huggingface_hub reads the token from its own store; sdlora never sees it.
"""

from __future__ import annotations

import json
from pathlib import Path

from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError is the HTTP library's own
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)

from sdlora.common.files import write_text
from sdlora.common.run_state import read_state
from sdlora.common.version import __version__
from sdlora.copycheck.verdict import EpochCheck
from sdlora.errors import HubError, OutputError
from sdlora.events import PlanMade
from sdlora.run.export import presentable
from sdlora.run.folder import RunFolder
from sdlora.run.setup import RunContext

MAX_PREVIEWS = 6
_FAMILY_TAGS = {
    "stable-diffusion-v1": "stable-diffusion",
    "stable-diffusion-v2": "stable-diffusion",
    "stable-diffusion-xl-v1-base": "stable-diffusion-xl",
}


def write_card(context: RunContext, plan: PlanMade, epoch: int) -> None:
    """Write the card of a finished run, of which an epoch was kept."""
    write_text(context.folder.card, f"---\n{_front_matter(context, epoch)}---\n\n{_body(context, plan, epoch)}")


def _front_matter(context: RunContext, epoch: int) -> str:
    config = context.config
    architecture = context.base.architecture.split("/")[0]
    tags = ["text-to-image", "diffusers", "lora", "template:sd-lora", "sdlora"]
    data = ModelCardData(
        license=config.file.licence,
        base_model=_hub_id(config.base.path),
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=[*tags, *([_FAMILY_TAGS[architecture]] if architecture in _FAMILY_TAGS else [])],
        instance_prompt=", ".join(config.data.triggers) or None,
        widget=[{"text": prompt, "output": {"url": file}} for file, prompt in _previews(context, epoch)] or None,
    )
    return str(data.to_yaml()) + "\n"


def _hub_id(base: str) -> str | None:
    """Name of the base on the Hub; None for a folder, a file or the built-in base."""
    return base if base.count("/") == 1 and not Path(base).expanduser().exists() else None


def _previews(context: RunContext, epoch: int) -> list[tuple[str, str]]:
    """The previews to show, as paths within the run folder, with their prompts."""
    if context.previews is None:
        return []
    folder = context.folder.epoch(epoch)
    found = presentable(context.previews, folder, captions=context.config.file.include_captions)[:MAX_PREVIEWS]
    return [
        ((folder / "previews" / file).relative_to(context.folder.path).as_posix(), prompt) for file, prompt in found
    ]


def _body(context: RunContext, plan: PlanMade, epoch: int) -> str:
    config, name = context.config, context.folder.name
    base = _hub_id(config.base.path)
    family = f"a base model of the family {context.base.architecture}"
    base_name = f"[{base}](https://huggingface.co/{base})" if base else family
    lines = [f"# {name}", "", f"A LoRA for {base_name}, trained with sdlora {__version__}.", ""]
    if triggers := config.data.triggers:
        words = " or ".join(f"`{trigger}`" for trigger in triggers)
        lines += [f"Use {words} in the prompt.", ""]
    lines += ["## Does it copy its training images?", "", _verdict(context, epoch), ""]
    prompt = context.previews.prompts[-1] if context.previews is not None else ", ".join(config.data.triggers)
    lines += [
        "## Use",
        "",
        "```python",
        "from diffusers import AutoPipelineForText2Image",
        f"pipe = AutoPipelineForText2Image.from_pretrained({json.dumps(base or 'path/to/the/base')})",
        f'pipe.load_lora_weights("path/to/this/folder", weight_name={json.dumps(context.folder.lora.name)})',
        f"image = pipe({json.dumps(prompt, ensure_ascii=False)}).images[0]",
        "```",
        "",
    ]
    lines += ["## Training", "", *_facts(context, plan, epoch), ""]
    if config.file.licence is None:
        terms = "No licence was chosen. The licence of the base model may restrict models derived from it."
        lines += ["## Licence", "", terms, ""]
    return "\n".join(lines)


def _verdict(context: RunContext, epoch: int) -> str:
    check = EpochCheck.read(context.folder.epoch(epoch))
    if check is None:
        return "No copy check was run."
    found, total = sum(match.significant for match in check.previews), len(check.previews)
    return (
        f"**{check.verdict}**: {found} of {total} previews are more similar to a training image than images that copy "
        "nothing, according to sdlora's copy check against every training image and its mirror image."
    )


def _facts(context: RunContext, plan: PlanMade, epoch: int) -> list[str]:
    lora = context.config.lora
    exposures = plan.exposures_per_image * epoch // plan.epochs
    seen = f"at most {exposures}" if len({one.repeats for one in plan.sets}) > 1 else str(exposures)
    resolution_px = context.config.data.resolution_px or context.base.resolution_px
    return [
        f"- {plan.images} images at {resolution_px} px, each seen {seen} times by epoch {epoch} of "
        f"{plan.epochs}, which is this file",
        f"- rank {lora.rank}, alpha {lora.alpha:g}, in {', '.join(lora.targets)}",
        f"- {plan.trained_parameters:,} trainable parameters; the base model is unchanged",
        f"- {context.config.train.optimizer}, learning rate {context.config.train.learning_rate:g}",
        "- loaded back through diffusers and compared with the trained weights before it was given away",
    ]


def push_run(folder: RunFolder, repo: str, *, private: bool, api: HfApi | None = None) -> str:
    """Upload a finished run to a repository, "owner/name", and return its URL.

    The repository is created, privately if so asked, if it does not exist.

    Raises:
        OutputError: The folder has no finished run.
        HubError: The Hub cannot be reached, or refuses.
    """
    files = files_to_push(folder)
    api = api or HfApi()
    try:
        url = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repo, folder_path=folder.path, allow_patterns=files, commit_message=f"Upload {folder.name}"
        )
    except HFValidationError as error:
        raise HubError(f"--repo {repo!r} is not a valid repository name; use 'owner/name'.") from error
    except LocalTokenNotFoundError as error:
        raise HubError("You are not logged in to the Hub. Run: hf auth login") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            refusal = f"You cannot write to {repo!r} on the Hub ({status}). Log in with a token that can: hf auth login"
        else:
            refusal = f"The Hub refused {repo!r} with status {status}. Try again later, or see status.huggingface.co."
        raise HubError(refusal) from error
    except (OfflineModeIsEnabled, HTTPError, OSError) as error:
        raise HubError(
            f"The Hub cannot be reached ({type(error).__name__}). Check the network, and that "
            "HF_HUB_OFFLINE is not set."
        ) from error
    return str(url)


def files_to_push(folder: RunFolder) -> list[str]:
    """The files of a run to upload, as paths within its folder.

    Raises:
        OutputError: It is not a run folder, or the run is not done.
    """
    state = read_state(folder.state)
    if state is None:
        raise OutputError(f"{folder.path} is not a run folder: it has no readable state.json.")
    if state.status != "done" or not folder.lora.is_file() or not folder.card.is_file():
        raise OutputError(
            f"The run in {folder.path} is not done (its status is {state.status!r}). Finish it with --resume."
        )
    card = ModelCard.load(folder.card)
    shown = [entry["output"]["url"] for entry in card.data.to_dict().get("widget") or []]
    inside = [url for url in shown if (folder.path / url).resolve().is_relative_to(folder.path.resolve())]
    return [folder.card.name, folder.lora.name, *(url for url in inside if Path(url).suffix == ".png")]
