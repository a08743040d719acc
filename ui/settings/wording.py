"""Messages in the words of the pages: what the command line calls `train.learning_rate` is "Learning rate" under More.

The pages pass every message on the settings, images and base models of a run through here.
"""

from __future__ import annotations

import functools
import re
from typing import Any

from sdlora.config.prompt_lines import as_line
from sdlora.config.toml import option_fields
from sdlora.data.checks import Finding, Kind

from . import form

# What the command line advises, and what an artist presses instead.
_PHRASES = {
    "Write one into NAME.txt beside each, set data.caption for all, or set data.trigger and data.allow_trigger_only.": (
        "Under Images, write one below each image, give all of them the same one under “Edit all captions at once”, or "
        "open “Have a model write captions”. To train on the trigger word alone, turn on data.allow_trigger_only."
    ),
    "The configuration is invalid:": "Some settings cannot be used:",
    "; `sdlora info` shows which one that is": "",
    "Set base.path to the model that it was trained on": "Choose the model that it was trained on",
    "; it is relative to the working directory": "",
    "To train on all of them, ": "To train on all of them, drop one of the subfolders under Images; or ",
    "; for repeats or a trigger of their own, list them in data.sets, or name each REPEATS_NAME (such as 10_zumi).": (
        "; or name each with its repeats, such as 10_zumi."
    ),
    " Set data.recursive = true to train on their images.": "",
    "Rename them to match an image, or remove them.": "Give them the name of an image, or remove them.",
}
# Flags of commands, and what an artist presses instead.
_FLAGS = (
    (re.compile(r"(add )?--resume --set ([\w.]+)=(\S+?)(?=[.,;]?(\s|$))"),
     r"press “Clone into the recipe” under Runs, and set \2 = \3"),
    (re.compile(r"\b([Cc]hoose) (another |a new )?(folder with )?--output"), r"\1 another name"),
    (re.compile(r"\b(Resume|Finish) it with --resume"), "Press Resume under Training"),
    (re.compile(r", or give --force to train with these settings"), ""),
    (re.compile(r"Use --overwrite to replace them"), "Clear a caption to have it written anew"),
    (re.compile(r"write \S+\.txt yourself"), "write one yourself"),
)  # fmt: skip
# What to press on the page of images, by what was found there; after what the data checks say.
_TO_PRESS: dict[Kind, str] = {
    "unreadable": "Press “Take out” on it, or drop a copy that opens in an image viewer.",
    "caption": "Type the caption that it should have below the image.",
    "no caption": "",
    "subfolder": "To train on them, drop the subfolder here, or choose it as a set.",
    "unused caption": "",
    "duplicate": "Press “Take out” on the others, under Duplicates.",
    "near-duplicate": "Press “Take out” on the others, under Duplicates.",
    "no trigger": "To write it into the captions, press “Add the trigger word to all captions”.",
    "too small": "",
    "cropped": "",
    "lone bucket": "",
    "mask": "Save the mask again, and drop it here.",
    "lone mask": "Rename it, and drop it here.",
    "no mask": "",
    "unused mask": "",
    "long caption": "Or shorten them: choose “Caption cut off” above the images.",
    "unused exclude": "",
    "dead link": "Drop the images themselves here.",
    "other format": "Drop them here again then.",
}
_ON_THE_PAGE = {"data.trigger", "data.folder", "base.path"}  # and not under More
_VALUES = {"true": "on", "false": "off"}


@functools.lru_cache(maxsize=4096)
def in_words(text: str) -> str:
    """A message with options under the names that they have on the pages, and with what to press."""
    for phrase, plain in _PHRASES.items():
        text = text.replace(phrase, plain)
    for flags, plain in _FLAGS:
        text = flags.sub(plain, text)
    return _options().sub(_named, text)


def finding_in_words(finding: Finding) -> str:
    """What the data checks have found, in the words of the pages, and what to press."""
    return f"{in_words(finding.message)} {_TO_PRESS[finding.kind]}".strip()


def help_in_words(text: str) -> str:
    """An option's help with the names that options have on the page, where they are beside it."""
    return _options().sub(lambda found: found[0].replace(found["name"], f"“{labels()[found['name']].label}”"), text)


def in_a_word(value: Any) -> str:
    """An option's value as it is shown in lists."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, float):
        return form.digits(value)
    if isinstance(value, list) and any(isinstance(one, str) for one in value):  # prompts may be tables, too
        value = [as_line(one) if isinstance(one, dict) else one for one in value]
    if isinstance(value, list) and not any(isinstance(one, dict) for one in value):
        return ", ".join(in_a_word(one).replace("_", " ") for one in value) or "none"
    return "none" if value is None or value in ("", {}, []) else str(value)


@functools.cache
def labels() -> dict[str, form.Field]:
    """Every option's field by its dotted name."""
    return {field.name: field for field in form.fields()}


@functools.cache
def _options() -> re.Pattern[str]:
    names = "|".join(re.escape(name) for name in sorted(option_fields(), key=len, reverse=True) if "." in name)
    return re.compile(rf"(?P<set>\b[Ss]et )?(?<![\w./])(?P<name>{names})(?![\w/])(?: = (?P<value>true|false))?")


def _named(found: re.Match[str]) -> str:
    name, verb, value = found["name"], found["set"] or "", found["value"]
    field = labels()[name]
    words = f"“{field.label}”" + ("" if name in _ON_THE_PAGE else f" (under More, {form.TITLES[field.section]})")
    if value is None:
        return f"{verb}{words}"
    state = _VALUES[value]
    if verb:
        return f"{'Turn' if verb[0] == 'S' else 'turn'} {state} {words}"
    return f"{words} = {state}"
