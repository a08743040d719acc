"""Options under their earlier names: read as what they are called now, with a warning.

Used wherever option names come in: TOML files, `--set`, run folders, jobs and the studio's drafts.
"""

from __future__ import annotations

import warnings
from typing import Any

from sdlora.errors import ConfigError

RENAMED = {
    "data.holdout": "data.validation_folder",
    "data.holdout_split": "data.validation_split",
    "lora.start": "lora.init",
    "train.schedule": "train.lr_schedule",
    "train.plus_ratio": "train.loraplus_lr_ratio",
    "file.tell_captions": "file.include_captions",
}
"""The current name of every option that had another one, both dotted."""


class RenamedOptionWarning(UserWarning):
    """An option was given by its earlier name."""


def current_name(name: str) -> str:
    """The option's current dotted name; warns if it was given by an earlier one."""
    if name not in RENAMED:
        return name
    warnings.warn(
        f"{name} is now called {RENAMED[name]}; the old name still works.", RenamedOptionWarning, stacklevel=2
    )
    return RENAMED[name]


def with_current_names(document: dict[str, Any]) -> dict[str, Any]:
    """A configuration's tables with every option by its current name.

    Args:
        document: Nested tables, as TOML has them; left as they are.

    Raises:
        ConfigError: An option is given by both of its names.
    """
    renamed = {section: dict(table) if isinstance(table, dict) else table for section, table in document.items()}
    for old in RENAMED:
        section, _, key = old.partition(".")
        table = renamed.get(section)
        if isinstance(table, dict) and key in table:
            new = current_name(old)
            if (new_key := new.partition(".")[2]) in table:
                raise ConfigError(f"{old} and {new} are one option; remove {old}.")
            table[new_key] = table.pop(key)
    return renamed
