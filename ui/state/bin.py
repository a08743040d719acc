"""The studio's bin: every change that can be undone, with the files that it took away.

Nothing is deleted at once: what is removed from the studio's own folders lies here until it is put back, or for a
month. Image sets and runs record their changes here.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from sdlora.common.files import write_json

from .folders import Studio, StudioError

KEPT_SECONDS = 30 * 24 * 3600
_RECORD = "change.json"


@dataclass(frozen=True)
class Change:
    """A change of a folder that can be undone."""

    key: str  # sorts changes by their time
    folder: str  # its absolute path
    words: str  # what was done, as a page says it
    moved: list[str] = field(default_factory=list)  # paths in the folder of files and folders that lie in the bin
    taken_out: list[str] = field(default_factory=list)  # images taken out of a set whose files stay
    captions: dict[str, list[str]] = field(default_factory=dict)  # by image: the caption before and after


class Bin:
    """The bin of a studio."""

    def __init__(self, studio: Studio) -> None:
        self._studio = studio

    def record(
        self,
        folder: Path,
        words: str,
        *,
        move: Sequence[str] = (),
        taken_out: Sequence[str] = (),
        captions: Mapping[str, Sequence[str]] | None = None,
    ) -> Change:
        """Record a change, and move files and folders into the bin, by their paths in the folder that is changed."""
        key = f"{time.time_ns():020d}"
        before = {image: list(texts) for image, texts in (captions or {}).items()}
        change = Change(key, str(folder.absolute()), words, list(move), list(taken_out), before)
        # The record comes first: a file is never in the bin without it.
        write_json(self._place(key) / _RECORD, asdict(change))
        _move(folder, self._place(key) / "files", move)
        return change

    def last(self, folder: Path) -> Change | None:
        """The last change of a folder that was not undone."""
        changes = (self.find(place.name) for place in sorted(self._studio.bin.glob("*/"), reverse=True))
        wanted = str(folder.absolute())
        return next((change for change in changes if change is not None and change.folder == wanted), None)

    def find(self, key: str) -> Change | None:
        """A change; None if it was undone or is gone."""
        file = self._place(key) / _RECORD
        if not key.isdecimal() or not file.is_file():
            return None
        return Change(**json.loads(file.read_text(encoding="utf-8")))

    def put_back(self, change: Change) -> None:
        """Move its files back, and forget the change.

        Raises:
            StudioError: Other files have their names now.
        """
        folder, files = Path(change.folder), self._place(change.key) / "files"
        there = [name for name in change.moved if (files / name).exists()]
        if taken := [name for name in there if (folder / name).exists()]:
            raise StudioError(
                f"{', '.join(taken)} cannot be put back: there is another one by that name. Rename it first."
            )
        _move(files, folder, there)
        shutil.rmtree(self._place(change.key))

    def empty(self) -> None:
        """Delete files that have been here for a month."""
        oldest = time.time_ns() - KEPT_SECONDS * 10**9
        for place in self._studio.bin.glob("*/"):
            change = self.find(place.name)
            if change is not None and change.moved and int(change.key) < oldest:
                shutil.rmtree(place, ignore_errors=True)

    def _place(self, key: str) -> Path:
        return self._studio.bin / key


def _move(source: Path, target: Path, names: Sequence[str]) -> None:
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.move(source / name, target / name)
