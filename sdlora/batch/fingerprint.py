"""One hash of everything that determines a job's result: settings, base, images, captions, and sdlora's version.

A batch compares it with the ledger to decide whether a finished job is still up to date.
"""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path

from sdlora.common.bundled import pocket_folder, resolve_data_folder
from sdlora.common.files import sha256
from sdlora.common.version import __version__
from sdlora.config.schema import RunConfig
from sdlora.config.toml import FREE_WHEN_RESUMING, options
from sdlora.data.captions import METADATA, SIDECARS
from sdlora.data.images import SUFFIXES

_HEAD_BYTES = 1 << 20
_NUM_SAMPLES = 64
_SAMPLE_BYTES = 4096


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
        text = json.dumps([__version__, settings, folders, self._base_content(config.base.path)], sort_keys=True)
        return hashlib.blake2b(text.encode("utf-8"), digest_size=16).hexdigest()


def _content(folder: Path, recursive: bool) -> str:
    """A hash of the names and bytes of all images and captions, or "missing" for a missing folder."""
    if not folder.is_dir():
        return "missing"
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted(folder.rglob("*") if recursive else folder.iterdir()):
        if file.is_file() and (file.suffix.lower() in SUFFIXES | SIDECARS or file.name == METADATA):
            name = file.relative_to(folder).as_posix()
            digest.update(f"{name}\x1f{sha256(file)}\x1e".encode())
    return digest.hexdigest()


def base_content(path: str) -> str:
    """A hash of a base's files: their names and sizes, the first MiB of each, and samples of the rest.

    Reading all weights would take longer than some runs. The first MiB contains a safetensors header, and most other
    files entirely; the rest is sampled by 64 evenly spaced blocks of 4 KiB. Training changes all of them; a change to
    single weights between them goes unnoticed. A hub id counts by its name and revision alone; hidden files are
    ignored.
    """
    location = pocket_folder() if path == "pocket" else Path(path).expanduser()
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
