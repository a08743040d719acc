"""What each preview of a run shows, by the name of its file: `previews.json` in the run's folder.

Written by `run` before the first preview; the report and the studio read it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from sdlora.common.files import write_json
from sdlora.previews.sampler import PreviewRequest

FILE = "previews.json"


class Shown(NamedTuple):
    """A preview that is drawn again and again, each time into a file of this name."""

    file: str
    label: str  # its prompt, and what sets it apart from the others
    seed: int
    checked: bool  # whether it is compared with the training images


def write_index(folder: Path, checked: PreviewRequest, further: Iterable[PreviewRequest]) -> None:
    """Write what a run draws after every epoch."""
    found = [
        Shown(name, label, seed, request is checked)._asdict()
        for request in (checked, *further)
        for name, label, (_, seed) in zip(request.file_names(), request.labels(), request.wanted(), strict=True)
    ]
    write_json(folder / FILE, found)


def read_index(folder: Path) -> list[Shown]:
    """What a run draws, in order; empty for one that was drawn before there was an index."""
    file = folder / FILE
    return [Shown(**entry) for entry in json.loads(file.read_text(encoding="utf-8"))] if file.is_file() else []
