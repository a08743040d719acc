"""Preview images in any trainer's configuration: prompts, each perhaps with settings of its own.

The tables' functions call these; each returns an outcome or the values of options.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from sdlora.config.imports.rules import EMPTY, Outcome, Source, dropped, number, text, translated, whole
from sdlora.config.prompt_lines import SAMPLERS

_READ = {
    "negative_prompt": text,
    "num_steps": whole,
    "guidance": number,
    "width_px": lambda value: preview_edge(value),
    "height_px": lambda value: preview_edge(value),
    "sampler": lambda value: SAMPLERS.get(text(value).lower()),
    "seeds": lambda value: [seed for seed in map(whole, value if isinstance(value, list) else [value]) if seed >= 0],
    "lora_scale": number,
}


def preview_edge(value: Any) -> int:
    """Width or height of previews, which are multiples of 8."""
    return whole(value) // 8 * 8


def sampler(value: Any, source: Source) -> Outcome:
    """The sampler of previews, by any trainer's name."""
    ours = SAMPLERS.get(text(value).lower())
    if ours is None:
        return dropped("previews use the base model's own sampler, or one of preview.sampler")
    return translated({"preview.sampler": ours})


def every_steps(value: Any, source: Source) -> Outcome:
    """Steps between previews."""
    return translated({"preview.every_steps": whole(value)}, "beside every epoch") if whole(value) else dropped("off")


def previews(entries: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The options of preview images: settings that all prompts have in common, and prompts with those of their own.

    Args:
        entries: One for each prompt, with the keys of a table of `preview.prompts`, as the other trainer has them.
    """
    given = [_read(entry) for entry in entries if text(entry["text"]).strip()]
    names = dict.fromkeys(name for entry in given for name in entry if name not in ("text", "lora_scale"))
    shared = {name: given[0][name] for name in names if all(entry.get(name) == given[0].get(name) for entry in given)}
    prompts: list[Any] = []
    for entry in given:
        own = {
            name: value for name, value in entry.items() if name not in shared and (name, value) != ("lora_scale", 1)
        }
        prompt = own if len(own) > 1 else own["text"]
        if prompt not in prompts:
            prompts.append(prompt)
    if not prompts:
        return {}
    return {"preview.prompts": prompts, **{f"preview.{name}": value for name, value in shared.items()}}


def _read(entry: Mapping[str, Any]) -> dict[str, Any]:
    """A prompt's settings in our units, without those that are not given."""
    found = {name: read(entry[name]) for name, read in _READ.items() if entry.get(name) not in EMPTY}
    return {"text": text(entry["text"]).strip()} | {n: value for n, value in found.items() if value not in EMPTY}
