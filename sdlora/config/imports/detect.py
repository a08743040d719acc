"""Which trainer a file comes from, and its translation.

The command line calls `import_file`; the form follows from what the file holds, not from its name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from sdlora.common.files import parse_toml, read_text
from sdlora.config.imports import ai_toolkit, command, kohya, kohya_gui, onetrainer
from sdlora.config.imports.rules import Imported, Rule, Source, translate
from sdlora.config.imports.settle import settle
from sdlora.config.toml import option_fields
from sdlora.errors import ConfigError

MAX_BYTES = 4 << 20
FORMS = (
    "kohya_ss (JSON), sd-scripts (TOML), OneTrainer (JSON), ai-toolkit (YAML) and diffusers' scripts (a command line)"
)


def import_file(path: Path) -> Imported:
    """Another trainer's configuration, translated.

    Args:
        path: A JSON, TOML or YAML file, or a text with a command line.

    Raises:
        ConfigError: The file cannot be read, or is of no form that sdlora knows.
    """
    try:
        content = read_text(path, MAX_BYTES)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}.") from error
    except ValueError as error:
        raise ConfigError(f"{path} is {error}.") from error
    try:
        source, rules = _source(_parse(content, path), content, path)
        return settle(source, translate(source, rules))
    except RecursionError as error:
        raise ConfigError(f"{path} is nested too deeply.") from error
    except ValueError as error:
        raise ConfigError(f"{path} cannot be read: {error}.") from error


def _parse(content: str, path: Path) -> Mapping[str, Any] | None:
    """The tables of a file in JSON, TOML or YAML; None if it is none of them, and not called so.

    Raises:
        ConfigError: The file is named after a form that it does not have.
    """
    suffix = path.suffix.lower().replace(".yml", ".yaml")
    for name, parse in ((".json", json.loads), (".toml", parse_toml), (".yaml", _yaml)):
        try:
            found = parse(content)
        except (ValueError, RecursionError) as error:
            if suffix == name:
                said = str(error).removeprefix("not valid TOML: ")
                raise ConfigError(f"{path} is not valid {name[1:].upper()}: {said}.") from error
            continue
        if isinstance(found, dict) and found:
            return {str(key): value for key, value in found.items()}
    return None


def _yaml(content: str) -> Any:
    try:
        return yaml.safe_load(content)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error


def _source(document: Mapping[str, Any] | None, content: str, path: Path) -> tuple[Source, dict[str, Rule]]:
    folder = path.parent
    if document is None:
        return command.read(content, folder)
    keys = set(document)
    if {"job", "config"} <= keys:
        return ai_toolkit.read(document), ai_toolkit.RULES
    if keys & {"LoRA_type", "max_resolution", "sdxl_no_half_vae"}:
        return kohya_gui.read(document, folder), kohya_gui.RULES
    if keys & {"training_method", "base_model_name", "layer_filter_preset", "concept_file_name", "model_type"}:
        return onetrainer.read(document, folder), onetrainer.RULES
    of_sections = {key for value in document.values() if isinstance(value, dict) for key in value}
    if "datasets" in keys or (keys | of_sections) & {"network_module", "network_dim", "pretrained_model_name_or_path"}:
        return kohya.read(document, folder), kohya.RULES
    if ".py" in content and "--" in content:
        return command.read(content, folder)
    ours = {name.partition(".")[0] for name in option_fields() if "." in name}
    if keys and keys <= {*ours, "name", "seed"}:
        raise ConfigError(f"{path} is already a configuration of sdlora.")
    raise ConfigError(f"{path} is not a configuration that sdlora can translate. It knows those of {FORMS}.")
