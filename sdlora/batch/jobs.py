"""From a jobs file to one validated configuration per run.

A fault in the file itself is an error; a fault in the settings of one job is kept with that job, and the others run.
"""

from __future__ import annotations

import copy
import difflib
import itertools
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from sdlora.config.schema import RunConfig
from sdlora.config.toml import RENAMED, option_fields, parse_config, read_config, with_current_names
from sdlora.errors import ConfigError

_NAME = re.compile(r"\w[\w. -]{0,99}")
_LONGEST_VALUE = 24


class _Defaults(BaseModel, extra="forbid", frozen=True):
    config: str | None = None
    set: dict[str, Any] = {}


class _Job(_Defaults):
    name: str | None = None
    priority: int = 0


class _File(BaseModel, extra="forbid", frozen=True):
    defaults: _Defaults = _Defaults()
    jobs: list[_Job] = [_Job()]
    sweep: dict[str, list[Any]] | list[dict[str, Any]] = {}


@dataclass(frozen=True)
class Job:
    """One run of a batch.

    Attributes:
        name: Job name with its swept values; names the run's folder and its LoRA file.
        priority: Jobs of higher priority run first.
        swept: The swept settings with the values of this job.
        config: None if it is invalid.
        fault: What is wrong with the configuration, or None.
    """

    name: str
    priority: int
    swept: Mapping[str, Any]
    config: RunConfig | None
    fault: str | None = None


def read_jobs(path: Path) -> list[Job]:
    """Read a jobs file.

    Args:
        path: TOML: `[defaults]` (config, set), `[[jobs]]` (name, config, set, priority), and `[sweep]` (lists of
            values by setting, every combination) or `[[sweep]]` (one combination each).

    Returns:
        The jobs, by priority, then grouped by base, otherwise in the order of the file.

    Raises:
        ConfigError: The file is missing, is not TOML, has unknown keys, or names two jobs alike.
    """
    file = _read(path)
    jobs = [job for entry in file.jobs for job in _swept(file, entry, path.stem)]
    names = [job.name for job in jobs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"{path}: more than one job is named {', '.join(twice)}. Give every job a unique name.")
    # A worker reloads the base whenever it differs from the previous job's.
    bases = {job.name: str(job.config.base) if job.config else "" for job in jobs}
    order = list(bases.values())
    return sorted(jobs, key=lambda job: (-job.priority, order.index(bases[job.name])))


def _read(path: Path) -> _File:
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"The jobs file {path} cannot be read: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}.") from error
    try:
        file = _File.model_validate(document)
    except ValidationError as error:
        faults = [f"  {'.'.join(map(str, fault['loc']))}: {fault['msg']}." for fault in error.errors()]
        raise ConfigError(
            f"{path} is invalid. Allowed are [defaults] with config and set, [[jobs]] with name, config, set and "
            "priority, and [sweep] with lists of values:\n" + "\n".join(faults)
        ) from error
    _check_keys(path, "defaults.set", _flat(file.defaults.set))
    for combination in _combinations(file.sweep):
        _check_keys(path, "sweep", combination)
    return file


def _check_keys(path: Path, where: str, keys: Mapping[str, Any]) -> None:
    """Report an unknown setting once, rather than as a fault of every job."""
    known = (*option_fields(), *RENAMED)
    for key in keys:
        if not any(key == name or key.startswith(f"{name}.") for name in known):
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.4)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise ConfigError(f"{path}: {where}: unknown setting {key!r}.{hint}")


def _swept(file: _File, entry: _Job, stem: str) -> Iterator[Job]:
    source = entry.config or file.defaults.config
    if source is None:
        raise ConfigError(
            f"The job {entry.name or stem!r} has no config. Set it for the job, or for all jobs in [defaults]."
        )
    name = entry.name or Path(source).stem
    if not _NAME.fullmatch(name):
        raise ConfigError(f"The job name {name!r} cannot be used for a folder; use letters, digits, '.', '_' and '-'.")
    settings = with_current_names(_flat(file.defaults.set)) | with_current_names(_flat(entry.set))
    combinations = _combinations(file.sweep)
    for combination in combinations:
        # A label keeps the name that was written, so that a batch of an earlier version finds its runs.
        full = "-".join([name, *(_label(combinations, key, value) for key, value in combination.items())])
        swept = with_current_names(combination)
        config, fault = None, None
        try:
            document, _ = read_config(source)
            config = parse_config(_merged(document, {**settings, **swept, "name": full}), name=full)
        except ConfigError as error:
            fault = str(error)
        yield Job(full, entry.priority, swept, config, fault)


def _combinations(sweep: Mapping[str, list[Any]] | Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    if isinstance(sweep, Mapping):
        return [dict(zip(sweep, values, strict=True)) for values in itertools.product(*sweep.values())]
    return [_flat(combination) for combination in sweep]


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by dotted name, whether they were written as "lora.rank" = 4 or as tables."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _merged(document: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    merged = with_current_names(copy.deepcopy(dict(document)))
    for name, value in settings.items():
        *sections, key = name.split(".")
        table = merged
        for section in sections:
            table = table.setdefault(section, {})
            if not isinstance(table, dict):
                raise ConfigError(f"{name}: {section!r} is a setting, not a section.")
        table[key] = value
    return merged


def _label(combinations: Sequence[Mapping[str, Any]], key: str, value: Any) -> str:
    """A swept value as part of a name, such as "rank8"; a long value, or not a word, by its position in the sweep."""
    short = key.rpartition(".")[2]
    text = f"{value:g}" if isinstance(value, float) else str(value)
    if len(text) <= _LONGEST_VALUE and re.fullmatch(r"[\w.+-]+", text):
        return short + text.replace("+", "")
    values: list[Any] = []
    for combination in combinations:
        if key in combination and combination[key] not in values:
            values.append(combination[key])
    return f"{short}{values.index(value) + 1}"
