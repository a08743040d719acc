"""What the studio notes about folders of images: which images are taken out, and whether it may write there.

A folder of the artist's own is only read, unless the artist allows more. The notes are kept in the studio's folder, and
every run of the folder leaves out the same images.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from sdlora.common.files import write_json

from .folders import Studio


@dataclass(frozen=True)
class FolderNotes:
    """The notes about a folder."""

    may_write: bool = False  # whether captions and images may be saved there
    taken_out: tuple[str, ...] = ()  # images that are left out, by their path in the folder


def read_notes(studio: Studio, folder: Path) -> FolderNotes:
    """The notes about a folder."""
    return _all(studio).get(_key(folder), FolderNotes())


def change_notes(studio: Studio, folder: Path, **changes: Any) -> None:
    """Change the notes about a folder."""
    with studio.lock():
        notes = _all(studio)
        notes[_key(folder)] = replace(notes.get(_key(folder), FolderNotes()), **changes)
        write_json(studio.folder_notes, {key: asdict(note) for key, note in notes.items() if note != FolderNotes()})


def _key(folder: Path) -> str:
    return str(folder.resolve())


def _all(studio: Studio) -> dict[str, FolderNotes]:
    if not studio.folder_notes.is_file():
        return {}
    found = json.loads(studio.folder_notes.read_text(encoding="utf-8"))
    return {key: FolderNotes(**note | {"taken_out": tuple(note["taken_out"])}) for key, note in found.items()}
