"""What a run draws after every epoch: the previews that are checked for copies, and those that are only shown.

Made when a run is set up, from `[preview]` and the training images. Checked are captions of the set and prompts that
are drawn as `[preview]` says, whatever their seeds; prompts with other settings of their own are shown beside them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import prod

from sdlora.config.schema import RunConfig
from sdlora.config.schema_preview import PreviewConfig, PreviewPrompt
from sdlora.data.dataset import Dataset
from sdlora.models.base import BaseModel
from sdlora.previews.prompts import concept, novel_prompts
from sdlora.previews.sampler import PreviewRequest

NUM_NOVEL = 3


def preview_request(preview: PreviewConfig, dataset: Dataset) -> PreviewRequest:
    """What is drawn and checked: some captions of the dataset, then the user's prompts or generated ones.

    Previews have the size and shape that most images are trained at, unless others are set. Prompts are generated where
    none is given that is checked.
    """
    (width, height), _ = Counter(example.bucket for example in dataset.examples).most_common(1)[0]
    captions = [example.prompt for example in dataset.examples]
    # Spread over the dataset, which is sorted by name.
    number = min(preview.num_captions, len(captions))
    drawn = list(dict.fromkeys(captions[index * len(captions) // number] for index in range(number)))
    triggers = list(dict.fromkeys(example.trigger for example in dataset.examples))
    usual = tuple(preview.seeds)
    novel = {
        prompt: usual if isinstance(entry, str) else tuple(entry.seeds or usual)
        for entry in preview.prompts
        if isinstance(entry, str) or is_checked(entry)
        for prompt in _with_triggers(entry if isinstance(entry, str) else entry.text, dataset)
    } or {
        prompt: usual
        for trigger in triggers
        for prompt in novel_prompts(captions, trigger, -(-NUM_NOVEL // len(triggers)))
    }
    seeds = (*(usual for _ in drawn), *novel.values())
    return PreviewRequest(
        prompts=(*drawn, *novel),
        seeds=usual,
        negative_prompt=preview.negative_prompt,
        num_steps=preview.num_steps,
        guidance=preview.guidance,
        num_captions=len(drawn),
        sampler=preview.sampler,
        size_px=(preview.width_px or width, preview.height_px or height),
        own_seeds=() if set(seeds) == {usual} else seeds,
    )


def drawn_as(config: RunConfig, kind: type[BaseModel]) -> RunConfig:
    """The configuration with the steps of what draws its previews: of a distilled sibling, if there is one.

    Args:
        kind: The base model's class.
    """
    if config.preview_base is None:
        return config
    steps = config.preview.base_steps or kind.few_steps or config.preview.num_steps
    preview = config.preview.model_copy(update={"num_steps": steps, "guidance": 1.0})
    return config.model_copy(update={"preview": preview})


def is_checked(entry: PreviewPrompt) -> bool:
    """Whether a prompt is drawn as `preview` says, apart from its seeds."""
    return entry.own().keys() <= {"seeds"}


def further_requests(preview: PreviewConfig, dataset: Dataset, checked: PreviewRequest) -> tuple[PreviewRequest, ...]:
    """What is drawn beside the previews that are checked: one request for every prompt with settings of its own."""
    first = len(checked.prompts)
    found: list[PreviewRequest] = []
    for entry in preview.prompts:
        if isinstance(entry, PreviewPrompt) and not is_checked(entry):
            found.append(_further(entry, tuple(_with_triggers(entry.text, dataset)), checked, first))
            first += len(found[-1].prompts)
    return tuple(found)


def _further(entry: PreviewPrompt, prompts: tuple[str, ...], checked: PreviewRequest, first: int) -> PreviewRequest:
    width, height = checked.pixels(0)
    return PreviewRequest(
        prompts=prompts,
        seeds=checked.seeds if entry.seeds is None else tuple(entry.seeds),
        negative_prompt=checked.negative_prompt if entry.negative_prompt is None else entry.negative_prompt,
        num_steps=entry.num_steps or checked.num_steps,
        guidance=entry.guidance or checked.guidance,
        sampler=entry.sampler or checked.sampler,
        size_px=(entry.width_px or width, entry.height_px or height),
        lora_scale=entry.lora_scale,
        first=first,
        sibling=checked.sibling,
        difference=_difference(entry, width, height),
    )


def _difference(entry: PreviewPrompt, width: int, height: int) -> str:
    """In a few words, in what a prompt differs from the others."""
    found = []
    if entry.width_px or entry.height_px:
        found.append(f"{entry.width_px or width}x{entry.height_px or height}")
    if entry.lora_scale != 1.0:
        found.append(f"LoRA at {entry.lora_scale:g}")
    if entry.guidance is not None:
        found.append(f"guidance {entry.guidance:g}")
    if entry.num_steps is not None:
        found.append(f"{entry.num_steps} steps")
    if entry.sampler is not None:
        found.append(entry.sampler)
    if entry.negative_prompt is not None:
        found.append(f"not: {entry.negative_prompt}" if entry.negative_prompt else "no negative prompt")
    return ", ".join(found)


def _with_triggers(text: str, dataset: Dataset) -> list[str]:
    """A prompt for every trigger word of the set."""
    captions = [example.prompt for example in dataset.examples]
    triggers = dict.fromkeys(example.trigger for example in dataset.examples)
    return list(dict.fromkeys(text.replace("{trigger}", concept(captions, trigger)) for trigger in triggers))


# --- What drawing takes -----------------------------------------------------------------------------------------------


def drawing_share(requests: Sequence[PreviewRequest]) -> float:
    """The arithmetic of drawing all requests over that of the first; 1 if there is no other."""
    taken = [
        len(one.wanted()) * (2 if one.guidance > 1 else 1) * one.num_steps * prod(one.pixels(0)) for one in requests
    ]
    return sum(taken) / taken[0] if taken else 1.0


def rounds_within_epochs(every_steps: int, steps: int, epochs: int, after: int = 0) -> int:
    """How often previews are drawn within the epochs of a run, from a step on.

    Args:
        every_steps: `preview.every_steps`.
        steps: Of the whole run.
    """
    if not every_steps:
        return 0
    per_epoch = max(1, steps // epochs)
    return sum(
        at % per_epoch != 0 for at in range(after // every_steps * every_steps + every_steps, steps, every_steps)
    )
