"""Uploads from the browser: images, captions and zips of both, checked and stored under safe names.

A zip is checked completely before anything of it is written.
"""

from __future__ import annotations

import functools
import lzma
import re
import stat
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple

from sdlora.common.bundled import IMAGE_SUFFIXES
from sdlora.common.files import atomic_path, write_text
from sdlora.common.text import format_bytes
from sdlora.config.kohya_folders import REGULARISATION, numbered, repeats_and_name
from sdlora.data.captions import METADATA, SIDECARS, caption_in, read_metadata
from sdlora.data.images import load_image
from sdlora.errors import DataError

from .folders import safe_name

MOST_FILES = 2000
MOST_BYTES = 64 * 2**20
MOST_BYTES_IN_ALL = 4 * 2**30
MOST_CAPTION_BYTES = 64 * 2**10
_MAX_ZIP_RATIO = 200  # images hardly shrink in a zip
_MAX_DIRECTORY_BYTES = 4 * 2**20
_ZIP_END_BYTES = 22 + 0xFFFF  # with the longest comment
_DRIVE = re.compile(r"[A-Za-z]:")
# Python's reader raises all of these for a malformed zip.
_ZIP_ERRORS = (
    OSError, ValueError, RuntimeError, EOFError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error,
)  # fmt: skip


class Intake(NamedTuple):
    """The names of stored images, the number of stored captions, and a sentence for every refused file."""

    images: tuple[str, ...]
    num_captions: int
    refused: tuple[str, ...]


@dataclass(frozen=True)
class _Entry:
    """A file of an upload: its name and size as declared, and how to read it."""

    name: str
    size: int
    open: Callable[[], IO[bytes]]

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.name).suffix.lower()

    @property
    def key(self) -> tuple[str, str]:
        """What an image and its caption have in common: folder and stem."""
        path = PurePosixPath(self.name)
        return str(path.parent), path.stem

    @property
    def subfolder(self) -> str:
        """Kohya's folder `REPEATS_NAME` that it lies in, below `reg` for images to preserve; empty if it does not."""
        *above, parent = PurePosixPath(self.name).parent.parts or ("",)
        if repeats_and_name(parent) is None:
            return ""
        return f"{REGULARISATION}/{safe_name(parent)}" if REGULARISATION in above else safe_name(parent)


def store_upload(
    files: Sequence[tuple[str, Path]], folder: Path, told: Callable[[int, int], object] = lambda done, total: None
) -> Intake:
    """Store files, each with its name as sent and its temporary path, in a set's folder; zips are unpacked.

    `told` is called with how many files are done, and how many there are.

    Of a zip, only kohya's folders `REPEATS_NAME` are kept, also those in `reg`: training reads repeats from them.

    Raises:
        DataError: The upload is too large, a zip is malformed, or it has kohya's folders where the set has none, or the
            other way round; then nothing is written.
    """
    entries = [entry for name, path in files for entry in _entries(name, path)]
    if len(entries) > MOST_FILES:
        raise DataError(
            f"The upload has {len(entries)} files; the limit is {MOST_FILES}. Upload fewer, or make two sets."
        )
    if (total := sum(entry.size for entry in entries)) > MOST_BYTES_IN_ALL:
        limit = format_bytes(MOST_BYTES_IN_ALL)
        raise DataError(f"The files are {format_bytes(total)} together; the limit is {limit}. Upload fewer images.")
    has_folders = any(entry.suffix in IMAGE_SUFFIXES and entry.subfolder for entry in entries)
    if any(entry.suffix in IMAGE_SUFFIXES for entry in entries):
        _refuse_mixture(folder, has_folders=has_folders)
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    targets = _targets(entries, folder, has_folders=has_folders)
    images: list[str] = []
    num_captions = 0
    refused: list[str] = []
    for number, entry in enumerate(entries):
        told(number, len(entries))
        try:
            if has_folders and not entry.subfolder:
                raise DataError(f"{entry.name}: not in one of the folders with repeats, such as 10_zumi.")
            if entry.suffix in IMAGE_SUFFIXES:
                target = targets[entry.key].with_name(f"{targets[entry.key].name}{entry.suffix}")
                check = functools.partial(load_image, background="white", suffix=entry.suffix)
                _store(entry, target, MOST_BYTES, check)
                images.append(target.relative_to(folder).as_posix())
            elif entry.suffix in SIDECARS:
                target = targets[entry.key].with_name(f"{targets[entry.key].name}{entry.suffix}")
                _store(entry, target, MOST_CAPTION_BYTES, functools.partial(caption_in, name=entry.name))
                num_captions += 1
            elif PurePosixPath(entry.name).name == METADATA:
                num_captions += _store_metadata(entry, _place(entry, folder, has_folders=has_folders), targets)
            else:
                raise DataError(f"{entry.name}: not an image, a caption (.txt, .caption, .json) or a zip.")
        except DataError as error:
            refused.append(str(error))
    if is_new and not images and not num_captions:
        _remove_empty(folder)
    return Intake(tuple(images), num_captions, tuple(refused))


def _remove_empty(folder: Path) -> None:
    """Remove a folder and those in it, unless one has a file."""
    for place in sorted(folder.glob("**/"), reverse=True):
        with suppress(OSError):
            place.rmdir()


def _refuse_mixture(folder: Path, *, has_folders: bool) -> None:
    """Refuse images that would keep training from reading a set as it is."""
    there = numbered(folder)
    has_images = folder.is_dir() and any(path.suffix.lower() in IMAGE_SUFFIXES for path in folder.iterdir())
    if has_folders and has_images:
        raise DataError(
            "The zip has folders with repeats, such as 10_zumi, but this set has none. Type the name of a new set, and "
            "drop the zip there."
        )
    if there and not has_images and not has_folders:
        raise DataError(
            f"This set consists of folders with repeats, such as {there[0][0].name}. Add images in a zip with such a "
            "folder, or type the name of a new set and drop them there."
        )


# --- Names ------------------------------------------------------------------------------------------------------------


def _place(entry: _Entry, folder: Path, *, has_folders: bool) -> Path:
    return folder / entry.subfolder if has_folders else folder


def _targets(entries: Sequence[_Entry], folder: Path, *, has_folders: bool) -> dict[tuple[str, str], Path]:
    """A new path without suffix for every image and its caption that no other image of its folder has."""
    taken: dict[Path, set[str]] = {}
    found: dict[tuple[str, str], Path] = {}
    for entry in entries:
        if entry.suffix not in IMAGE_SUFFIXES or entry.key in found:
            continue
        place = _place(entry, folder, has_folders=has_folders)
        if place not in taken:
            there = place.iterdir() if place.is_dir() else ()
            taken[place] = {path.stem.lower() for path in there if path.suffix.lower() in IMAGE_SUFFIXES}
        wanted = stem = safe_name(entry.key[1])
        number = 2
        while stem.lower() in taken[place]:
            stem, number = f"{wanted}-{number}", number + 1
        taken[place].add(stem.lower())
        found[entry.key] = place / stem
    for entry in entries:
        # A caption without its image belongs to an image already in the set.
        found.setdefault(entry.key, _place(entry, folder, has_folders=has_folders) / safe_name(entry.key[1]))
    return found


# --- Single files -----------------------------------------------------------------------------------------------------


def _store(entry: _Entry, target: Path, most_bytes: int, check: Callable[[Path], object]) -> None:
    if entry.size > most_bytes:
        raise DataError(f"{entry.name}: larger than {format_bytes(most_bytes)}.")
    with atomic_path(target) as temporary:
        written = 0
        with temporary.open("wb") as sink:
            for chunk in _chunks(entry):
                written += len(chunk)
                if written > most_bytes:
                    raise DataError(
                        f"{entry.name}: larger than {format_bytes(most_bytes)}, and than its declared size."
                    )
                sink.write(chunk)
        try:
            check(temporary)
        except DataError as error:
            raise DataError(str(error).replace(temporary.name, entry.name)) from error


def _chunks(entry: _Entry) -> Iterator[bytes]:
    try:
        with entry.open() as source:
            while chunk := source.read(1 << 20):
                yield chunk
    except _ZIP_ERRORS as error:
        raise DataError(f"{entry.name}: its zip entry is broken ({error}).") from error


def _store_metadata(entry: _Entry, folder: Path, targets: dict[tuple[str, str], Path]) -> int:
    """Turn a `metadata.jsonl` into a caption file for each of its images."""
    with tempfile.TemporaryDirectory() as scratch:
        _store(entry, Path(scratch) / METADATA, MOST_BYTES, lambda _: None)
        captions, faults = read_metadata(Path(scratch) / METADATA)
    if faults:
        raise DataError(faults[0])
    if len(captions) > MOST_FILES:
        raise DataError(f"{entry.name} has {len(captions)} captions; the limit is {MOST_FILES}. Split it.")
    parent = entry.key[0]
    for name, text in captions.items():
        stem = PurePosixPath(name).stem
        target = targets.get((parent, stem), folder / safe_name(stem))
        write_text(target.with_name(f"{target.name}.txt"), text)
    return len(captions)


# --- Zips -------------------------------------------------------------------------------------------------------------


def _entries(name: str, path: Path) -> Iterator[_Entry]:
    if PurePosixPath(name).suffix.lower() != ".zip":
        yield _Entry(safe_name(name), path.stat().st_size, lambda: path.open("rb"))
        return
    if _directory_bytes(path) > _MAX_DIRECTORY_BYTES:
        raise DataError(f"{safe_name(name)} has far more than {MOST_FILES} files. Split it.")
    try:
        archive = zipfile.ZipFile(path)
    except _ZIP_ERRORS as error:
        raise DataError(f"{safe_name(name)} is not a valid zip ({error}). Create it again.") from error
    infos = [info for info in archive.infolist() if not info.filename.endswith("/")]
    if len(infos) > MOST_FILES:
        raise DataError(f"{safe_name(name)} has {len(infos)} files; the limit is {MOST_FILES}. Split it.")
    for info in infos:
        if (reason := _refusal(info)) is not None:
            raise DataError(
                f"{safe_name(name)} was refused: {info.orig_filename!r} {reason}. Zip only images and captions."
            )
    for info in infos:
        hidden = any(part.startswith((".", "__MACOSX")) for part in PurePosixPath(info.filename).parts)
        if not hidden:
            yield _Entry(info.filename, info.file_size, functools.partial(archive.open, info))


def _directory_bytes(path: Path) -> int:
    """The size of a zip's list of files as its end gives it, 0 without one: Python reads the list before counting."""
    with path.open("rb") as handle:
        handle.seek(max(0, path.stat().st_size - _ZIP_END_BYTES))
        _, mark, end = handle.read().rpartition(b"PK\5\6")
    return int.from_bytes(end[8:12], "little") if mark else 0


def _refusal(info: zipfile.ZipInfo) -> str | None:
    """Why a zip entry is refused, or None."""
    name = info.orig_filename
    parts = name.split("/")
    refusals = {
        "has no name": not info.filename,
        "has a forbidden character in its name": "\\" in name or "\0" in name,
        "has an absolute path": name.startswith("/") or _DRIVE.match(name),
        "points outside of its folder": ".." in parts,
        "is a symbolic link": stat.S_ISLNK(info.external_attr >> 16),
        "is encrypted": info.flag_bits & 1,
        "is a nested archive": name.lower().endswith((".zip", ".7z", ".rar", ".tar", ".gz")),
        "has a reserved device name": any(safe_name(part) == f"_{part.strip('. ')}" for part in parts if part),
        f"is larger than {format_bytes(MOST_BYTES)}": info.file_size > MOST_BYTES,
        f"unpacks to more than {_MAX_ZIP_RATIO} times its compressed size": info.file_size > 2**20
        and info.file_size > _MAX_ZIP_RATIO * max(1, info.compress_size),
    }
    return next((reason for reason, applies in refusals.items() if applies), None)
