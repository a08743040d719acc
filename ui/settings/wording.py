"""Messages in the words of the pages: what the command line calls `train.learning_rate` is "Learning rate" under More.

The pages pass every message on the settings, images and base models of a run through here.
"""

from __future__ import annotations

import functools
import re
from typing import Any

from sdlora.config.prompt_lines import as_line
from sdlora.config.toml import option_fields

from . import form

# What the command line advises, and what an artist presses instead.
_PHRASES = {
    "Write one into NAME.txt beside each, set data.caption for all, or set data.trigger and data.allow_trigger_only.": (
        "Write them under Images, one by one, the same for all or by a model; or turn on data.allow_trigger_only."
    ),
    "The configuration is invalid:": "Some settings cannot be used:",
    "; `sdlora info` shows which one that is": "",
    "Set base.path to the model that it was trained on": "Choose the model that it was trained on",
    "; it is relative to the working directory": "",
    "Rename them to match an image, or remove them.": "Give them the name of an image, or remove them.",
}
_ON_THE_PAGE = {"data.trigger", "data.folder", "base.path"}  # and not under More
_VALUES = {"true": "on", "false": "off"}


def in_words(text: str) -> str:
    """A message with options under the names that they have on the pages, and with what to press."""
    for phrase, plain in _PHRASES.items():
        text = text.replace(phrase, plain)
    return _options().sub(_named, text)


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
