"""From a jobs file to one validated configuration per run, and one hash of everything that determines a job's result.

A fault in the file itself is an error; a fault in the settings of one job is kept with that job, and the others run. A
batch compares the hash with the ledger to decide whether a finished job is still up to date.
"""

from __future__ import annotations

import copy
import difflib
import functools
import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from sdlora.common.bundled import IMAGE_SUFFIXES, builtin_base, resolve_data_folder
from sdlora.common.files import read_toml, sha256
from sdlora.common.version import __version__
from sdlora.config.schema import RunConfig
from sdlora.config.toml import (
    FREE_WHEN_RESUMING,
    RENAMED,
    option_fields,
    options,
    parse_config,
    read_config,
    with_current_names,
)
from sdlora.data.captions import METADATA, SIDECARS
from sdlora.errors import ConfigError

_NAME = re.compile(r"\w[\w. -]{0,99}")
_LONGEST_VALUE = 24
_HEAD_BYTES = 1 << 20
_NUM_SAMPLES = 64
_SAMPLE_BYTES = 4096


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
        document = read_toml(path)
    except OSError as error:
        raise ConfigError(f"The jobs file {path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise ConfigError(f"{path} is {error}.") from error
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


_LATER = (  # options that came later
    "base.merge", "lora.from_file", "base.components", "base.text_encoder", "base.vae", "base.training_adapter",
    "preview.base", "preview.base_steps",
)  # fmt: skip


class Fingerprints:
    """Fingerprints of jobs; a folder or base that several jobs share is read once."""

    def __init__(self) -> None:
        self._folder_content, self._base_content = functools.cache(_content), functools.cache(base_content)

    def of(self, config: RunConfig) -> str:
        """The fingerprint of a job; see `base_content` for the base."""
        settings = [(name, value) for name, value in options(config) if name not in FREE_WHEN_RESUMING]
        folders = [
            self._folder_content(resolve_data_folder(one.folder).resolve(), one.recursive)
            for one in (*config.data.sets, config.data.validation_set, config.data.prior_set)
            if one is not None
        ]
        # Jobs without them keep the fingerprint that they had before there were any.
        settings = [(name, value) for name, value in settings if name not in _LATER or value]
        folders += [_file_content(Path(file).expanduser()) for file in config.lora_files]
        beside = (config.base.components, config.base.text_encoder, config.base.vae, config.preview.base)
        folders += [self._base_content(path) for path in beside if path is not None]
        text = json.dumps([__version__, settings, folders, self._base_content(config.base.path)], sort_keys=True)
        return hashlib.blake2b(text.encode("utf-8"), digest_size=16).hexdigest()


def _content(folder: Path, recursive: bool) -> str:
    """A hash of the names and bytes of all images and captions, or "missing" for a missing folder."""
    if not folder.is_dir():
        return "missing"
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted(folder.rglob("*") if recursive else folder.iterdir()):
        if file.is_file() and (file.suffix.lower() in IMAGE_SUFFIXES | SIDECARS or file.name == METADATA):
            name = file.relative_to(folder).as_posix()
            digest.update(f"{name}\x1f{sha256(file)}\x1e".encode())
    return digest.hexdigest()


def _file_content(file: Path) -> str:
    return sha256(file) if file.is_file() else "missing"


def base_content(path: str) -> str:
    """A hash of a base's files: their names and sizes, the first MiB of each, and samples of the rest.

    Reading all weights would take longer than some runs. The first MiB contains a safetensors header, and most other
    files entirely; the rest is sampled by 64 evenly spaced blocks of 4 KiB. Training changes all of them; a change to
    single weights between them goes unnoticed. A hub id counts by its name and revision alone; hidden files are
    ignored.
    """
    location = builtin_base(path) or Path(path).expanduser()
    digest = hashlib.blake2b(digest_size=16)
    for file in [location] if location.is_file() else sorted(location.rglob("*")):
        name = file.relative_to(location)
        if not file.is_file() or any(part.startswith(".") for part in name.parts):
            continue
        size = file.stat().st_size
        digest.update(f"{name.as_posix()}\x1f{size}\x1e".encode())
        with file.open("rb") as handle:
            digest.update(handle.read(_HEAD_BYTES))
            for sample in range(_NUM_SAMPLES if size > _HEAD_BYTES else 0):
                handle.seek((size - _SAMPLE_BYTES) * sample // (_NUM_SAMPLES - 1))
                digest.update(handle.read(_SAMPLE_BYTES))
    return digest.hexdigest()
