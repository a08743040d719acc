"""Configurations as files: read from TOML with overrides, validated as a whole, written with every default.

All ways in (command line, batches, studio) and run folders go through here.
"""

from __future__ import annotations

import copy
import difflib
import functools
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tomlkit
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from sdlora.common.bundled import shipped_config, shipped_configs
from sdlora.config.renamed import current_name, with_current_names
from sdlora.config.schema import RunConfig
from sdlora.config.schema_data import Section, SetOptions
from sdlora.config.schema_training import MAX_EPOCHS
from sdlora.errors import ConfigError

FREE_WHEN_RESUMING = {
    "cache.dir",
    "cache.max_text_gib",
    "file.licence",
    # How a step is computed does not change its result, and nothing is trained on previews.
    "preview.enabled",
    "train.auto_batch",
    "train.checkpoint_every_steps",
    "train.compile",
    "train.gradient_checkpointing",
    "train.log_every_steps",
}
"""Options that do not change the result, so that a run may resume with other values."""


def load_config(source: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Read and validate a configuration.

    Args:
        source: A TOML file's path, or the name of a bundled configuration.
        overrides: Of the form "section.key=value"; a value that is not TOML is taken as a string.

    Raises:
        ConfigError: The file does not exist or is not TOML, or options are invalid; all of them are reported at once.
    """
    document, name = read_config(source)
    return parse_config(document, name=name, overrides=overrides)


def read_config(source: str) -> tuple[dict[str, Any], str]:
    """A configuration as written, not validated, and the name of its file without the suffix.

    Args:
        source: A TOML file's path, or the name of a bundled configuration.

    Raises:
        ConfigError: The file does not exist or is not TOML.
    """
    path = Path(source)
    if not path.is_file():
        shipped = shipped_config(source)
        if shipped is None:
            near = difflib.get_close_matches(source, shipped_configs(), n=1)
            hint = (
                f" Did you mean {near[0]!r}?" if near else f" Bundled configurations: {', '.join(shipped_configs())}."
            )
            raise ConfigError(f"No configuration file or bundled configuration {source!r}.{hint}")
        path = shipped
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}.") from error
    return document, path.stem


def parse_config(document: Mapping[str, Any], *, name: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Validate a configuration.

    Args:
        document: Nested tables.
        name: The run's name if the document has none.
        overrides: As in `load_config`.

    Raises:
        ConfigError: Options are invalid; all of them are reported at once.
    """
    changed = with_current_names(copy.deepcopy(dict(document)))
    for override in overrides:
        _apply(changed, override)
    data = changed.get("data")
    faults = []
    if not isinstance(data, Mapping) or not (data.get("folder") or data.get("sets")):
        faults.append("data.folder: not set; give the folder with your images.")
    try:
        config = RunConfig.model_validate({"name": name, **changed})
        faults += [f"{key}: {value!r} is not valid UTF-8." for key, value in options(config) if not _is_utf8(value)]
    except ValidationError as error:
        faults = [_describe(dict(fault)) for fault in error.errors()] + faults
    if faults:
        raise ConfigError("The configuration is invalid:\n" + "\n".join(f"  {fault}" for fault in faults))
    return config


def _is_utf8(value: Any) -> bool:
    """Whether a value can be written to a file: command-line arguments may contain undecodable bytes."""
    try:
        str(value).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _apply(document: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    names = current_name(key.strip()).split(".")
    if not separator or not all(names):
        raise ConfigError(f"--set {override!r}: expected section.key=value.")
    try:
        value: Any = tomllib.loads(f"value = {text}")["value"]
    except (tomllib.TOMLDecodeError, KeyError, RecursionError):
        value = text.strip()
    table = document
    for name in names[:-1]:
        table = table.setdefault(name, {})
        if not isinstance(table, dict):
            raise ConfigError(f"--set {override!r}: {name!r} is an option, not a section.")
    table[names[-1]] = value


def _describe(fault: dict[str, Any]) -> str:
    """One validation error as a sentence: the option, the value found, what is allowed."""
    key = ".".join(str(part) for part in fault["loc"])
    found, limits = fault["input"], fault.get("ctx", {})
    if fault["type"] == "extra_forbidden":
        known = [f"data.sets.{name}" for name in SetOptions.model_fields] if "sets" in fault["loc"] else option_names()
        key = ".".join(str(part) for part in fault["loc"] if not isinstance(part, int))
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


def option_names() -> list[str]:
    """Every option by its dotted name, in the schema's order."""
    return list(option_fields())


def options(config: RunConfig) -> Iterator[tuple[str, Any]]:
    """Every option by its dotted name with its value as plain Python data, in the schema's order."""
    for name, value in config.model_dump().items():
        if isinstance(getattr(config, name), Section):
            yield from ((f"{name}.{key}", entry) for key, entry in value.items())
        else:
            yield name, value


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


def json_schema() -> dict[str, Any]:
    """The JSON schema of configurations."""
    return RunConfig.model_json_schema()
