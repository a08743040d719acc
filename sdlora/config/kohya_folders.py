"""Folders as kohya's trainers name them: subfolders `REPEATS_NAME` of images, and `reg` with images to preserve.

Applied to a configuration before it is validated; a run's own configuration lists the folders it was started with.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from sdlora.common.bundled import BUILTIN, IMAGE_SUFFIXES
from sdlora.common.remote import is_url
from sdlora.errors import ConfigError

_NAMED = re.compile(r"(\d{1,4})_(.+)")
_IMAGES, REGULARISATION = "img", "reg"


def with_kohya_folders(document: dict[str, Any]) -> dict[str, Any]:
    """A document whose data.folder, if it holds nothing but kohya's subfolders, is replaced by one set for each.

    A set's repeats are those of its folder's name; the rest of the name captions images that have no caption, as it
    does there. Images in data.exclude, by their path in data.folder, are left out. Images in `reg`, inside the folder
    or beside `img`, are preserved with weight 1, unless the document says what to preserve.

    Raises:
        ConfigError: `reg` holds several kinds of images.
    """
    data = document.get("data")
    if not isinstance(data, dict) or data.get("sets"):
        return document
    folder = data.get("folder")
    if not isinstance(folder, str) or not folder or is_url(folder) or folder.startswith(BUILTIN):
        return document
    chosen = top = Path(folder).expanduser()
    named = _named(top)
    if not named and (named := _named(top / _IMAGES)):
        top /= _IMAGES
    if not named:
        return document
    sets: list[dict[str, Any]] = [
        {"folder": str(path), "repeats": repeats, "caption": name} for path, repeats, name in named
    ]
    if isinstance(exclude := data.get("exclude"), list):
        for one, (path, _, _) in zip(sets, named, strict=True):
            inside = f"{path.relative_to(chosen).as_posix()}/"
            one["exclude"] = [str(name).removeprefix(inside) for name in exclude if str(name).startswith(inside)]
    if data.get("caption"):
        sets = [{key: value for key, value in one.items() if key != "caption"} for one in sets]
    found = {key: value for key, value in data.items() if key not in ("folder", "exclude")} | {"sets": sets}
    train = document.get("train", {})
    preserves = data.get("class_words") or data.get("preservation_folder")
    if isinstance(train, dict) and not preserves and (reg := _regularisation(top)) is not None:
        found |= {"preservation_folder": str(reg[0]), "preservation_caption": reg[1]}
        train = {"preservation_weight": 1.0} | train
    return document | {"data": found, "train": train}


def _named(folder: Path) -> list[tuple[Path, int, str]]:
    """The subfolders `REPEATS_NAME` of a folder with their repeats and names; none if it holds files with images."""
    found = numbered(folder)
    return (
        []
        if found and any(path.is_file() and path.suffix.lower() in IMAGE_SUFFIXES for path in folder.iterdir())
        else found
    )


def numbered(folder: Path) -> list[tuple[Path, int, str]]:
    """The subfolders `REPEATS_NAME` of a folder with their repeats and names, whatever else it holds."""
    try:
        entries = sorted(path for path in folder.iterdir() if path.is_dir())
    except (OSError, ValueError):
        return []  # reported by name when images are read
    matches = [(path, repeats_and_name(path.name)) for path in entries]
    return [(path, *match) for path, match in matches if match is not None]


def repeats_and_name(folder: str) -> tuple[int, str] | None:
    """The repeats and the name in a folder's name `REPEATS_NAME`; None if it is not of that form."""
    match = _NAMED.fullmatch(folder)
    return (int(match[1]), match[2].strip()) if match and int(match[1]) > 0 else None


def _regularisation(top: Path) -> tuple[Path, str] | None:
    """The folder of images to preserve that belongs to a folder of sets, and their caption."""
    places = [top / REGULARISATION, *([top.parent / REGULARISATION] if top.name == _IMAGES else [])]
    for place in places:
        if len(named := _named(place)) > 1:
            raise ConfigError(
                f"{place} holds {len(named)} kinds of images to preserve, and a run preserves one. Name it with "
                "data.preservation_folder."
            )
        if named:
            return named[0][0], named[0][2]
    return None
