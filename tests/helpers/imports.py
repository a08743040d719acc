"""Short ways to translate another trainer's settings, and to look at what became of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sdlora.config.imports import ai_toolkit, diffusers, kohya, kohya_gui, onetrainer
from sdlora.config.imports.detect import import_file
from sdlora.config.imports.rules import Fate, Imported, Rule, translate
from sdlora.config.imports.settle import settle

FIXTURES = Path(__file__).parents[1] / "config" / "imports" / "fixtures"
TABLES: dict[str, dict[str, Rule]] = {
    "sd_scripts": kohya.RULES,
    "kohya_ss": kohya_gui.RULES,
    "onetrainer": onetrainer.RULES,
    "ai_toolkit": ai_toolkit.RULES,
    "diffusers": diffusers.RULES,
}


def workplace(folder: Path) -> None:
    """Folders of images as the fixtures name them: 4 in photos and photos/10_hero, 2 in reg and reg/1_girl."""
    for name, count in (("photos", 4), ("photos/10_hero", 4), ("reg", 2), ("reg/1_girl", 2)):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            (folder / name / f"{number}.png").touch()


def of_json(folder: Path, document: dict[str, Any]) -> Imported:
    """Translate an object as a JSON file in a folder."""
    file = folder / "settings.json"
    file.write_text(json.dumps(document), encoding="utf-8")
    return import_file(file)


def of_arguments(**values: Any) -> Imported:
    """Translate sd-scripts' training arguments."""
    source = kohya.of_arguments("sd-scripts", values, Path())
    return settle(source, translate(source, kohya.RULES))


def fate_of(imported: Imported, key: str) -> Fate:
    """What became of a key."""
    return next(fate for fate in imported.fates if fate.key == key)


def option(imported: Imported, name: str) -> Any:
    """The value of an option by its dotted name; None if it is not set."""
    section, _, key = name.rpartition(".")
    return (imported.document.get(section, {}) if section else imported.document).get(key)


def flat(imported: Imported) -> dict[str, Any]:
    """All options that are set, by dotted name."""
    found: dict[str, Any] = {}
    for name, value in imported.document.items():
        if isinstance(value, dict):
            found |= {f"{name}.{key}": entry for key, entry in value.items()}
        else:
            found[name] = value
    return found
