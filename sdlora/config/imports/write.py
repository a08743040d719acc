"""A translated configuration as a TOML file, with what is left to decide as comments.

The last step of an import; `sdlora train` reads the file.
"""

from __future__ import annotations

import re
from typing import Any

import tomlkit

from sdlora.config.imports.rules import Fate, Imported, Status
from sdlora.config.toml import option_fields

_SECRET = re.compile(r"(?:^|[_.])(?:token|api_key|secrets?|password)$")


def shown(value: Any, limit: int = 60) -> str:
    """A value as it is shown to people, in one line and not too long."""
    line = " ".join(("" if value is None else str(value)).split())
    return line if len(line) <= limit else f"{line[: limit - 1]}…"


def shown_value(fate: Fate) -> str:
    """The value of a key as it is shown; what may be a password is not."""
    return "(not shown)" if fate.value and _SECRET.search(fate.key.lower()) else shown(fate.value)


def as_toml(imported: Imported, source: str) -> str:
    """The configuration in the schema's order.

    Args:
        imported: The translation.
        source: The name of the file it comes from, for a comment.
    """
    document = tomlkit.document()
    document.add(tomlkit.comment(f"Translated from {shown(source, 100)} ({imported.form}) by sdlora import."))
    open_fates = [fate for fate in imported.fates if fate.status in (Status.REFUSED, Status.UNKNOWN)]
    if open_fates:
        document.add(tomlkit.comment("Not translated, and left to you:"))
    for fate in open_fates:
        document.add(tomlkit.comment(f"  {fate.key} = {shown_value(fate)}: {shown(fate.reason, 400)}"))
    for name in option_fields():
        section, _, key = name.rpartition(".")
        given = imported.document.get(section, {}) if section else imported.document
        if key in given:
            if section and section not in document:
                document.add(section, tomlkit.table())
            inside: Any = document[section] if section else document
            inside.add(key, _item(given[key]))
    return tomlkit.dumps(document)


def _item(value: Any) -> Any:
    """A value for tomlkit: tables in a list as tables of their own, other tables inline."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        tables = tomlkit.aot()
        for entry in value:
            tables.append(tomlkit.item(entry))
        return tables
    if isinstance(value, dict):
        inline = tomlkit.inline_table()
        inline.update(value)
        return inline
    return value
