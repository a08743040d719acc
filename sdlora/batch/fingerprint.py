"""What a job's result follows from, as one hash: settings, pictures and captions, and the version of sdlora.

Floor 7.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from sdlora import __version__
from sdlora.config import RunConfig
from sdlora.configfile import FREE_WHEN_RESUMING, options
from sdlora.data.captions import METADATA
from sdlora.data.images import SUFFIXES
from sdlora.files import sha256
from sdlora.shipped import resolve_data_folder


class Fingerprints:
    """Fingerprints of jobs; a folder that several of them share is read once."""

    def __init__(self) -> None:
        self._folders: dict[Path, str] = {}

    def of(self, config: RunConfig) -> str:
        """The fingerprint of a job.

        A base counts by its path and revision alone: reading all its weights would take longer than some runs.
        """
        settings = [(name, value) for name, value in options(config) if name not in FREE_WHEN_RESUMING]
        data = config.data
        named = [*(one.folder for one in data.all_sets()), data.holdout, data.preservation_folder]
        folders = [self._content(folder) for folder in named if folder]
        text = json.dumps([__version__, settings, folders], sort_keys=True)
        return hashlib.blake2b(text.encode("utf-8"), digest_size=16).hexdigest()

    def _content(self, folder: str) -> str:
        path = resolve_data_folder(folder).resolve()
        if path not in self._folders:
            self._folders[path] = _content(path)
        return self._folders[path]


def _content(folder: Path) -> str:
    """A hash of the names and bytes of all pictures and captions; a folder that is not there has none."""
    if not folder.is_dir():
        return "missing"
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted(folder.iterdir()):
        if file.is_file() and (file.suffix.lower() in SUFFIXES | {".txt"} or file.name == METADATA):
            digest.update(f"{file.name}\x1f{sha256(file)}\x1e".encode())
    return digest.hexdigest()
