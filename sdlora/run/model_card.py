"""The model card: README.md in a run's folder, which the Hub shows beside the files.

Written by `run` at its end. It reveals captions, folders and file names only if `file.include_captions` is set.
"""

from __future__ import annotations

import json
from pathlib import Path

from huggingface_hub import ModelCardData

from sdlora.common.files import write_text
from sdlora.common.version import __version__
from sdlora.copycheck.verdict import EpochCheck
from sdlora.events import PlanMade
from sdlora.run.export import presentable
from sdlora.run.setup import RunContext

MAX_PREVIEWS = 6
_FAMILY_TAGS = {
    "stable-diffusion-v1": "stable-diffusion",
    "stable-diffusion-v2": "stable-diffusion",
    "stable-diffusion-xl-v1-base": "stable-diffusion-xl",
}


def write_card(context: RunContext, plan: PlanMade, epoch: int) -> None:
    """Write the card of a finished run.

    Args:
        context: Of the run.
        plan: Of the run.
        epoch: The epoch that was kept.
    """
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
    lines = [f"# {name}", ""]
    base_name = (
        f"[{base}](https://huggingface.co/{base})"
        if base
        else f"a base model of the family {context.base.architecture}"
    )
    lines += [f"A LoRA for {base_name}, trained with sdlora {__version__}.", ""]
    if triggers := config.data.triggers:
        words = " or ".join(f"`{trigger}`" for trigger in triggers)
        lines += [f"Use {words} in the prompt.", ""]
    lines += ["## Does it copy its training images?", "", _verdict(context, epoch), ""]
    lines += ["## Use", "", "```python", *_code(context, base), "```", ""]
    lines += ["## Training", "", *_facts(context, plan, epoch), ""]
    if config.file.licence is None:
        lines += [
            "## Licence",
            "",
            "No licence was chosen. The licence of the base model may restrict models derived from it.",
            "",
        ]
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


def _code(context: RunContext, base: str | None) -> list[str]:
    prompt = context.previews.prompts[-1] if context.previews is not None else ", ".join(context.config.data.triggers)
    return [
        "from diffusers import AutoPipelineForText2Image",
        f"pipe = AutoPipelineForText2Image.from_pretrained({json.dumps(base or 'path/to/the/base')})",
        f'pipe.load_lora_weights("path/to/this/folder", weight_name={json.dumps(context.folder.lora.name)})',
        f"image = pipe({json.dumps(prompt, ensure_ascii=False)}).images[0]",
    ]


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
