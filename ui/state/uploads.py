"""What comes in through the browser: images, captions and zips of both, counted, measured and given safe names.

Nothing of a zip is written before all of its list was looked at.
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
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from sdlora.common.files import atomic_path, write_text
from sdlora.common.text import format_bytes
from sdlora.data.captions import METADATA, read_captions
from sdlora.data.images import SUFFIXES, load_image
from sdlora.errors import DataError

from .folders import safe_name

MOST_FILES = 2000
MOST_BYTES = 64 * 2**20
MOST_BYTES_IN_ALL = 4 * 2**30
MOST_CAPTION_BYTES = 64 * 2**10
_MOST_UNPACKING = 200  # what a zip may grow by; images hardly shrink in one
_DRIVE = re.compile(r"[A-Za-z]:")
# Python's own reader lets all of these out, for a zip that lies.
_BROKEN = (OSError, ValueError, RuntimeError, EOFError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error)
_NOTHING = "not an image, a caption (.txt) or a zip"


@dataclass(frozen=True)
class Intake:
    """What became of an upload.

    Attributes:
        images: The names that the images got.
        num_captions: How many captions came along.
        refused: A sentence for every file that was left out.
    """

    images: tuple[str, ...]
    num_captions: int
    refused: tuple[str, ...]


@dataclass(frozen=True)
class _Entry:
    """A file of an upload: its name as sent, its size as told, and how to read it."""

    name: str
    size: int
    open: Callable[[], IO[bytes]]

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.name).suffix.lower()


def take_in(files: Sequence[tuple[str, Path]], folder: Path) -> Intake:
    """Copy an upload's images and captions into a set; zips are opened.

    Args:
        files: The name that each was sent with, and where it lies now.
        folder: The set's.

    Raises:
        DataError: It is too much, or a zip is not what it should be; then nothing is written.
    """
    entries = [entry for name, path in files for entry in _entries(name, path)]
    if len(entries) > MOST_FILES:
        raise DataError(f"{len(entries)} files are more than {MOST_FILES}. Train on fewer images, or make two sets.")
    if (total := sum(entry.size for entry in entries)) > MOST_BYTES_IN_ALL:
        limit = format_bytes(MOST_BYTES_IN_ALL)
        raise DataError(f"The files are {format_bytes(total)} together; the limit is {limit}. Upload fewer images.")
    folder.mkdir(parents=True, exist_ok=True)
    stems = _stems(entries, folder)
    images: list[str] = []
    num_captions = 0
    refused: list[str] = []
    for entry in entries:
        try:
            if entry.suffix in SUFFIXES:
                name = f"{stems[_key(entry)]}{entry.suffix}"
                _store(entry, folder / name, MOST_BYTES, _check_image)
                images.append(name)
            elif entry.suffix == ".txt":
                _store(entry, folder / f"{stems[_key(entry)]}.txt", MOST_CAPTION_BYTES, _check_text)
                num_captions += 1
            elif PurePosixPath(entry.name).name == METADATA:
                num_captions += _take_in_list(entry, folder, stems)
            else:
                raise DataError(f"{entry.name}: {_NOTHING}.")
        except DataError as error:
            refused.append(str(error))
    return Intake(tuple(images), num_captions, tuple(refused))


# --- Names ------------------------------------------------------------------------------------------------------------


def _key(entry: _Entry) -> tuple[str, str]:
    """What an image and its caption have in common."""
    path = PurePosixPath(entry.name)
    return str(path.parent), path.stem


def _stems(entries: Sequence[_Entry], folder: Path) -> dict[tuple[str, str], str]:
    """A new name without its suffix for every image and its caption, none of them taken by another image."""
    taken = {path.stem.lower() for path in folder.iterdir() if path.suffix.lower() in SUFFIXES}
    found: dict[tuple[str, str], str] = {}
    for key in dict.fromkeys(_key(entry) for entry in entries if entry.suffix in SUFFIXES):
        wanted = stem = safe_name(key[1])
        number = 2
        while stem.lower() in taken:
            stem, number = f"{wanted}-{number}", number + 1
        taken.add(stem.lower())
        found[key] = stem
    for entry in entries:
        # A caption that comes alone belongs to an image that is there.
        found.setdefault(_key(entry), safe_name(_key(entry)[1]))
    return found


# --- Single files -----------------------------------------------------------------------------------------------------


def _store(entry: _Entry, target: Path, most_bytes: int, check: Callable[[Path], None]) -> None:
    if entry.size > most_bytes:
        raise DataError(f"{entry.name}: larger than {format_bytes(most_bytes)}.")
    with atomic_path(target) as temporary:
        with temporary.open("wb") as sink:
            _copy(_chunks(entry), sink, entry.name, most_bytes)
        try:
            check(temporary)
        except DataError as error:
            raise DataError(str(error).replace(temporary.name, entry.name)) from error


def _chunks(entry: _Entry) -> Iterator[bytes]:
    try:
        with entry.open() as source:
            while chunk := source.read(1 << 20):
                yield chunk
    except _BROKEN as error:
        raise DataError(f"{entry.name}: its part of the zip is broken ({error}).") from error


def _copy(chunks: Iterator[bytes], sink: IO[bytes], name: str, most_bytes: int) -> None:
    written = 0
    for chunk in chunks:
        written += len(chunk)
        if written > most_bytes:
            raise DataError(f"{name}: larger than {format_bytes(most_bytes)}, and than its declared size.")
        sink.write(chunk)


def _check_image(path: Path) -> None:
    load_image(path, "white")


def _check_text(path: Path) -> None:
    try:
        path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path.name}: not UTF-8 text. Save it as UTF-8.") from error


def _take_in_list(entry: _Entry, folder: Path, stems: dict[tuple[str, str], str]) -> int:
    """Turn a `metadata.jsonl` into a caption file for each of its images."""
    with tempfile.TemporaryDirectory() as scratch:
        _store(entry, Path(scratch) / METADATA, MOST_BYTES, _check_text)
        captions, faults = read_captions(Path(scratch))
    if faults:
        raise DataError(faults[0][1])
    parent = _key(entry)[0]
    for name, text in captions.items():
        stem = stems.get((parent, PurePosixPath(name).stem), safe_name(PurePosixPath(name).stem))
        write_text(folder / f"{stem}.txt", text)
    return len(captions)


# --- Zips -------------------------------------------------------------------------------------------------------------


def _entries(name: str, path: Path) -> Iterator[_Entry]:
    if PurePosixPath(name).suffix.lower() != ".zip":
        yield _Entry(safe_name(name), path.stat().st_size, lambda: path.open("rb"))
        return
    try:
        archive = zipfile.ZipFile(path)
    except _BROKEN as error:
        raise DataError(f"{safe_name(name)} is no zip that can be opened ({error}). Pack it anew.") from error
    infos = [info for info in archive.infolist() if not info.filename.endswith("/")]
    if len(infos) > MOST_FILES:
        raise DataError(f"{safe_name(name)} holds {len(infos)} files, more than {MOST_FILES}. Make it smaller.")
    for info in infos:
        if (reason := _danger(info)) is not None:
            raise DataError(
                f"{safe_name(name)} was not opened: {info.orig_filename!r} {reason}. Pack images and captions alone."
            )
    for info in infos:
        hidden = any(part.startswith((".", "__MACOSX")) for part in PurePosixPath(info.filename).parts)
        if not hidden:
            yield _Entry(info.filename, info.file_size, functools.partial(archive.open, info))


def _danger(info: zipfile.ZipInfo) -> str | None:
    """Why an entry has no place in a zip of images, or None."""
    name = info.orig_filename
    parts = name.split("/")
    if not info.filename:
        return "has no name"
    if "\\" in name or "\0" in name:
        return "has a character in its name that no file here may have"
    if name.startswith("/") or _DRIVE.match(name):
        return "names a place on this machine"
    if ".." in parts:
        return "leads out of its folder"
    if stat.S_ISLNK(info.external_attr >> 16):
        return "is a link to another file"
    if info.flag_bits & 1:
        return "needs a password"
    if name.lower().endswith((".zip", ".7z", ".rar", ".tar", ".gz")):
        return "is an archive inside the archive"
    if any(safe_name(part) == f"_{part.strip('. ')}" for part in parts if part):
        return "is named as a device is"
    if info.file_size > MOST_BYTES:
        return f"is larger than {format_bytes(MOST_BYTES)}"
    if info.file_size > 2**20 and info.file_size > _MOST_UNPACKING * max(1, info.compress_size):
        return f"unpacks to more than {_MOST_UNPACKING} times its size"
    return None
