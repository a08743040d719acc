"""Configurations as files: read from TOML with overrides, validated as a whole, written with every default.

All ways in (command line, batches, studio) and run folders go through here. Earlier names of options are read under
their current name, with a warning.
"""

from __future__ import annotations

import copy
import difflib
import functools
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import tomlkit
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from sdlora.common.bundled import shipped_config, shipped_configs
from sdlora.common.files import parse_toml, read_toml
from sdlora.config.kohya_folders import with_kohya_folders
from sdlora.config.schema import MergedLora, RunConfig
from sdlora.config.schema_data import LOCATION, Section, SetOptions
from sdlora.config.schema_preview import PROMPT_TAGS, PreviewPrompt
from sdlora.config.schema_training import MAX_EPOCHS
from sdlora.errors import ConfigError, RenamedOptionWarning

FREE_WHEN_RESUMING = {
    "base.family",
    "cache.dir",
    "cache.max_text_gib",
    "file.licence",
    # How a step is computed does not change its result, and nothing is trained on previews.
    "preview.enabled",
    "preview.every_steps",
    "train.auto_batch",
    "train.checkpoint_every_steps",
    "train.compile",
    "train.gradient_checkpointing",
    "base.offload",
    "train.log_every_steps",
    "train.trackers",
}
"""Options that do not change the result, so that a run may resume with other values."""

RENAMED = {
    "data.holdout": "data.validation_folder",
    "data.holdout_split": "data.validation_split",
    "lora.start": "lora.init",
    "train.schedule": "train.lr_schedule",
    "train.plus_ratio": "train.loraplus_lr_ratio",
    "file.tell_captions": "file.include_captions",
}
"""The current name of every renamed option, both dotted."""


def load_config(source: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Read and validate a configuration; see `read_config` and `parse_config`."""
    document, name = read_config(source)
    return parse_config(document, name=name, overrides=overrides)


def read_config(source: str, *, alone: bool = False) -> tuple[dict[str, Any], str]:
    """A configuration as written, over the one that it `extends`, and the name of its file without the suffix.

    Args:
        source: A TOML file's path, or the name of a bundled configuration.
        alone: Whether it may extend bundled configurations only, since somebody else wrote it.

    Raises:
        ConfigError: The file, or one it extends, does not exist or is not TOML.
    """
    path = _find(source)
    return _read(path, (), alone=alone), path.stem


def _find(source: str, folder: Path = Path()) -> Path:
    """The file of a configuration, by its path relative to a folder or by the name of a bundled one."""
    path = folder / source
    try:
        if path.is_file():
            return path
    except OSError as error:
        raise ConfigError(f"The configuration {source[:100]!r}… cannot be read: {error.strerror}.") from error
    if (shipped := shipped_config(source)) is not None:
        return shipped
    near = difflib.get_close_matches(source, shipped_configs(), n=1)
    hint = f"Did you mean {near[0]!r}?" if near else f"Bundled configurations: {', '.join(shipped_configs())}."
    raise ConfigError(f"No configuration file or bundled configuration {source!r}. {hint}")


def _read(path: Path, extended_by: tuple[Path, ...], *, alone: bool) -> dict[str, Any]:
    """A configuration's tables over those of the one that it extends."""
    if path.resolve() in (file.resolve() for file in extended_by):
        raise ConfigError(f"{path} extends itself: {' extends '.join(file.stem for file in (*extended_by, path))}.")
    try:
        document = read_toml(path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise ConfigError(f"{path} is {error}.") from error
    if (parent := document.pop("extends", None)) is None:
        return document
    if not isinstance(parent, str):
        raise ConfigError(f"{path}: extends = {parent!r}; give one file's path or the name of a bundled configuration.")
    below = shipped_config(parent) if alone else _find(parent, path.parent)
    if below is None:
        raise ConfigError(
            f"{path.name} extends {parent!r}, which was not uploaded with it. Extend one of the bundled configurations "
            f"({', '.join(shipped_configs())}), or load what 'sdlora train' wrote as config.toml."
        )
    return _over(_read(below, (*extended_by, path), alone=alone), document)


def _over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Tables merged key by key; any other value replaces the one below."""
    both = {
        key: _over(below[key], value)
        for key, value in above.items()
        if isinstance(value, dict) and isinstance(below.get(key), dict)
    }
    return below | above | both


def parse_config(document: Mapping[str, Any], *, name: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Validate a configuration.

    Args:
        document: Nested tables.
        name: The run's name if the document has none; what names may not contain becomes blanks.
        overrides: Of the form "section.key=value"; a value that is not TOML is taken as a string.

    Raises:
        ConfigError: Options are invalid; all of them are reported at once.
    """
    changed = with_current_names(copy.deepcopy(dict(document)))
    for override in overrides:
        _apply(changed, override)
    changed = with_kohya_folders(changed)
    data = changed.get("data")
    faults = []
    if not isinstance(data, Mapping) or not (data.get("folder") or data.get("sets")):
        faults.append("data.folder: not set; give the folder with your images.")
    try:
        config = RunConfig.model_validate({"name": _as_name(name), **changed})
        # Command-line arguments hold lone surrogates for bytes that are not text; no file can store them.
        broken = [(key, value) for key, value in options(config) if re.search("[\ud800-\udfff]", str(value))]
        faults += [f"{key}: {value!r} is not valid UTF-8." for key, value in broken]
    except ValidationError as error:
        faults = [_describe(dict(fault)) for fault in error.errors()] + faults
    if faults:
        raise ConfigError("The configuration is invalid:\n" + "\n".join(f"  {fault}" for fault in faults))
    return config


def _as_name(stem: str) -> str:
    """A run's name from the name of a file, such as "small 1" from "small (1)"."""
    if re.fullmatch(r"\w[\w. -]{0,99}", stem):
        return stem
    words = re.sub(r" *[^\w. -]+ *", " ", stem).strip(" .-")
    return words.encode()[:100].decode(errors="ignore").strip() or "lora"


def _apply(document: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    names = _current_name(key.strip()).split(".")
    if not separator or not all(names):
        raise ConfigError(f"--set {override!r}: expected section.key=value.")
    try:
        value: Any = parse_toml(f"value = {text}")["value"]
    except (ValueError, KeyError):  # also integers of thousands of digits
        value = text.strip()
    table = document
    for name in names[:-1]:
        table = table.setdefault(name, {})
        if not isinstance(table, dict):
            raise ConfigError(f"--set {override!r}: {name!r} is an option, not a section.")
    table[names[-1]] = value


def _describe(fault: dict[str, Any]) -> str:
    """One validation error as a sentence: the option, the value found, what is allowed."""
    loc = [part for part in fault["loc"] if part not in (*PROMPT_TAGS, "[key]")]
    key = ".".join(str(part) for part in loc)
    found, limits = fault["input"], fault.get("ctx", {})
    if fault["type"] == "extra_forbidden":
        tables = {"sets": [f"data.sets.{name}" for name in SetOptions.model_fields]}
        tables["merge"] = [f"base.merge.{name}" for name in MergedLora.model_fields]
        tables["prompts"] = [f"preview.prompts.{name}" for name in PreviewPrompt.model_fields]
        known = next((names for table, names in tables.items() if table in loc), [*option_fields()])
        key = ".".join(str(part) for part in loc if not isinstance(part, int))
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.4)
        return f"{key}: unknown option." + (f" Did you mean {near[0]}?" if near else "")
    if key == "train.epochs" and isinstance(found, int) and found > MAX_EPOCHS:
        return (
            f"train.epochs: found {found}; the maximum is {MAX_EPOCHS}. With more epochs a LoRA memorises its training "
            "images and reproduces them (copy-paste overfitting). Use 3 to 5 epochs; if the LoRA learns too little, "
            "add images, or raise data.repeats or train.learning_rate."
        )
    if fault["type"] == "value_error":
        reason = f"{limits['error']}."
        if not key or reason.startswith(key):
            return reason
        return f"{key}: {reason}" if isinstance(found, Mapping) else f"{key}: found {found!r}; {reason}"
    message = fault["msg"][0].lower() + fault["msg"][1:]
    return f"{key}: found {found!r}; {message}."


@functools.cache
def option_fields() -> dict[str, FieldInfo]:
    """Every option by its dotted name with its description, limits and default, in the schema's order."""
    fields: dict[str, FieldInfo] = {}
    for name, field in RunConfig.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            section = field.annotation.model_fields.items()
            fields |= {f"{name}.{option.alias or attribute}": option for attribute, option in section}
        else:
            fields[name] = field
    return fields


def options(config: RunConfig) -> Iterator[tuple[str, Any]]:
    """Every option by its dotted name with its value as plain Python data, in the schema's order."""
    for name, value in config.model_dump().items():
        if isinstance(getattr(config, name), Section):
            yield from ((f"{name}.{key}", entry) for key, entry in value.items())
        else:
            yield name, value


def locations(
    document: Mapping[str, Any], section: type[Section] = RunConfig, prefix: str = ""
) -> Iterator[tuple[str, str]]:
    """Every file, folder and URL that a configuration names, with the dotted name of its option.

    Args:
        document: Nested tables, which need not be valid.
        section: What the tables are read as.
        prefix: Of the options' names.
    """
    for attribute, option in section.model_fields.items():
        key = option.alias or attribute
        value = document.get(key)
        if LOCATION in option.metadata:
            if isinstance(value, str) and value:
                yield prefix + key, value
            continue
        kinds = (option.annotation, *get_args(option.annotation))
        inner = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)), None)
        for entry in value if isinstance(value, list) else [value]:
            if inner is not None and isinstance(entry, Mapping):
                yield from locations(entry, inner, f"{prefix}{key}.")


def dump_toml(config: RunConfig) -> str:
    """The complete configuration as TOML with every option's description; it reads back as the same configuration."""
    lines: list[str] = []
    section = ""
    for name, value in options(config):
        head, _, key = name.rpartition(".")
        if head != section:
            section = head
            lines += ["", f"[{section}]"]
        lines.append(f"# {option_fields()[name].description}")
        lines.append(f"# {key} =" if value is None else f"{key} = {toml_value(value)}")
    return "\n".join(lines) + "\n"


def toml_value(value: Any) -> str:
    """A value in TOML, on one line."""
    array = tomlkit.array()
    array.append(value)  # tables inside an array are written inline
    return array.as_string()[1:-1]


def renaming_note(name: str) -> str:
    """The warning about an earlier name of an option."""
    return f"{name} is now called {RENAMED[name]}; the old name still works."


def renaming_notes(document: Mapping[str, Any]) -> list[str]:
    """One warning per earlier name that is used in a configuration's nested tables."""
    given = {f"{name}.{key}" for name, table in document.items() if isinstance(table, Mapping) for key in table}
    return [renaming_note(name) for name in RENAMED if name in given]


def _current_name(name: str) -> str:
    """The current dotted name of an option, with a warning about an earlier one."""
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
        elif (name := _current_name(key)) != key and name in settings:
            raise ConfigError(f"{key} and {name} are the same option; remove {key}.")
        else:
            renamed[name] = value
    return renamed
