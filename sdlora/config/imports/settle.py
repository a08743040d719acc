"""From what became of single keys to one configuration that is valid as a whole.

The last step of every import, after a form's table was applied by `rules`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from sdlora.config.imports.rules import Fate, Imported, Source, Status
from sdlora.config.schema import FROM_FILE
from sdlora.config.toml import parse_config
from sdlora.errors import ConfigError


def settle(source: Source, fates: Sequence[Fate]) -> Imported:
    """The configuration that the fates make, without what contradicts itself or what the schema refuses."""
    fates = _without_contradictions(_without_what_a_file_decides(fates))
    if _fault(_with_folder(_document(fates))):
        settled: list[Fate] = []
        for fate in fates:
            fault = _fault(_with_folder(_document([*settled, fate])))
            settled.append(replace(fate, status=Status.REFUSED, options={}, reason=fault) if fault else fate)
        fates = settled
    document = _document(fates)
    if document != _with_folder(document):
        reason = "the file names no folder of images; 'images' stands for it"
        fates = [*fates, Fate("images", None, Status.REFUSED, {"data.folder": "images"}, reason, given=False)]
    return Imported(source.form, _document(fates), tuple(fates))


def _without_what_a_file_decides(fates: Sequence[Fate]) -> list[Fate]:
    """Drop ranks, alphas and targets where training continues from a file, which has them."""
    if not any("lora.from_file" in fate.options for fate in fates):
        return list(fates)
    decided = {f"lora.{name}" for name in FROM_FILE}
    found: list[Fate] = []
    for fate in fates:
        options = {name: value for name, value in fate.options.items() if name not in decided}
        if len(options) == len(fate.options):
            found.append(fate)
        elif options or fate.status is Status.REFUSED:
            found.append(replace(fate, options=options))
        elif fate.given:
            found.append(replace(fate, options={}, status=Status.DROPPED, reason="the file of lora.from_file has it"))
    return found


def _without_contradictions(fates: Sequence[Fate]) -> list[Fate]:
    """Refuse a key that sets an option to another value than a key before it does."""
    found: list[Fate] = []
    values: dict[str, Fate] = {}
    for fate in fates:
        clash = next(
            (name for name, value in fate.options.items() if name in values and values[name].options[name] != value),
            None,
        )
        if clash:
            before = values[clash]
            reason = (
                f"{before.key} makes {clash} = {before.options[clash]}, and this {fate.options[clash]}; set it yourself"
            )
            fate = replace(fate, status=Status.REFUSED, options={}, reason=reason)
        values |= dict.fromkeys(fate.options, fate)
        found.append(fate)
    return found


def _fault(document: Mapping[str, Any]) -> str:
    """Why the schema refuses a configuration, or nothing."""
    try:
        parse_config(document, name="imported")
    except ConfigError as error:
        # The message's first line is its heading.
        return " ".join(line.strip() for line in str(error).splitlines()[1:]) or str(error)
    return ""


def _document(fates: Sequence[Fate]) -> dict[str, Any]:
    document: dict[str, Any] = {}
    for fate in fates:
        for name, value in fate.options.items():
            section, _, key = name.rpartition(".")
            inside = document.setdefault(section, {}) if section else document
            inside[key] = {**inside.get(key, {}), **value} if isinstance(value, dict) else value
    return document


def _with_folder(document: dict[str, Any]) -> dict[str, Any]:
    """The document with a folder of images, without which no configuration is valid."""
    data = document.get("data", {})
    return document if data.get("folder") or data.get("sets") else {**document, "data": {**data, "folder": "images"}}
