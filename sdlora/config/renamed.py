"""Earlier names of options: read under their current name, with a warning.

Used wherever option names come in: TOML files, `--set`, run folders, batch jobs and the studio's drafts.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from sdlora.errors import ConfigError, RenamedOptionWarning

RENAMED = {
    "data.holdout": "data.validation_folder",
    "data.holdout_split": "data.validation_split",
    "lora.start": "lora.init",
    "train.schedule": "train.lr_schedule",
    "train.plus_ratio": "train.loraplus_lr_ratio",
    "file.tell_captions": "file.include_captions",
}
"""The current name of every renamed option, both dotted."""


def renaming_note(name: str) -> str:
    """The warning about an earlier name of an option."""
    return f"{name} is now called {RENAMED[name]}; the old name still works."


def renaming_notes(document: Mapping[str, Any]) -> list[str]:
    """One warning per earlier name that is used in a configuration's nested tables."""
    sections = {section: table for section, table in document.items() if isinstance(table, Mapping)}
    given = {f"{section}.{key}" for section, table in sections.items() for key in table}
    return [renaming_note(name) for name in RENAMED if name in given]


def current_name(name: str) -> str:
    """The current dotted name of an option; warns about an earlier one."""
    if name not in RENAMED:
        return name
    warnings.warn(renaming_note(name), RenamedOptionWarning, stacklevel=2)
    return RENAMED[name]


def with_current_names(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Options under their current names.

    Args:
        settings: Values by dotted name, or nested tables as in TOML; not modified.

    Raises:
        ConfigError: An option is given under both of its names.
    """
    renamed: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            table = with_current_names({f"{key}.{inner}": entry for inner, entry in value.items()})
            renamed[key] = {name.removeprefix(f"{key}."): entry for name, entry in table.items()}
        elif (name := current_name(key)) != key and name in settings:
            raise ConfigError(f"{key} and {name} are the same option; remove {key}.")
        else:
            renamed[name] = value
    return renamed
