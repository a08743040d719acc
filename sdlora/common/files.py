"""Atomic writes: a reader, or a crash, only ever sees the old content or the new one; and reading people's texts.

Used by everything that writes files, or reads texts from anywhere. A file is written under a temporary name next to its
target, flushed and renamed.
"""

from __future__ import annotations

import codecs
import errno
import hashlib
import json
import os
import platform
import re
import shutil
import threading
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from safetensors import SafetensorError

from sdlora.errors import DiskFullError, OutputError

_TEMPORARY_MARK = ".sdlora-partial-"
_FULL = (errno.ENOSPC, errno.EDQUOT)
# In a shared folder, this machine cannot see whether another machine's processes are alive.
_MACHINE = re.sub(r"\W", "", platform.node())[:40] or "here"


@contextmanager
def atomic_path(path: Path, *, is_durable: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` when the block ends without an error.

    Unless it is durable, a power cut may take the file, which saves waiting for the disk.

    Raises:
        DiskFullError: The disk is full. The old file, if there was one, is untouched.
    """
    temporary = _temporary(path)
    try:
        with disk_full_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            if is_durable:
                _sync(temporary)
            temporary.replace(path)
            if is_durable:
                _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder; rename it to `path` when the block ends without an error, delete it otherwise.

    Raises:
        OutputError: `path` exists.
        DiskFullError: The disk is full.
    """
    if path.exists():
        raise OutputError(f"{path} already exists. Choose another name, or move it away.")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    try:
        with disk_full_errors(path):
            temporary.mkdir()
            yield temporary
            for file in temporary.rglob("*"):
                _sync(file)
            temporary.rename(path)
            _sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def disk_full_errors(path: Path) -> Iterator[None]:
    """Turn the errors of a full disk while `path` is written in the block into a `DiskFullError`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        # safetensors reports it only in the message.
        full = "os error 28" in str(error) if isinstance(error, SafetensorError) else error.errno in _FULL
        if full:
            raise DiskFullError(f"No disk space left to write {path}. Free some space and try again.") from error
        raise


def _temporary(path: Path) -> Path:
    """A name that no other machine, process or thread uses."""
    # A file name has at most 255 bytes, including the mark.
    stem = path.name.encode("utf-8")[:150].decode("utf-8", errors="ignore")
    return path.with_name(f".{stem}{_TEMPORARY_MARK}{_MACHINE}-{os.getpid()}-{threading.get_ident()}")


def _sync(path: Path) -> None:
    """Flush a file, or a folder's entries, to the disk."""
    if path.is_dir() and os.name != "posix":
        return  # Windows cannot open folders
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_bytes(path: Path, content: bytes) -> None:
    """Replace `path` by `content` atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, content: str) -> None:
    """Replace `path` by UTF-8 text atomically."""
    write_bytes(path, content.encode("utf-8"))


def read_text(path: Path, most_bytes: int = 1 << 20) -> str:
    """A text that a person wrote: UTF-8 with or without a byte order mark, its lines ending in a line feed alone.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is not UTF-8, or longer than that; the message continues a sentence that names it.
    """
    with path.open("rb") as handle:
        content = handle.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise ValueError(f"larger than {most_bytes >> 20} MiB, too large for what it should be. Check which file it is")
    # In UTF-16 every second byte of western texts is zero.
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or 2 * content.count(0) >= len(content) > 0:
        raise ValueError("not valid UTF-8 (it looks like UTF-16, which some editors call Unicode). Save it as UTF-8")
    try:
        return content.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"not valid UTF-8 ({error.reason} at byte {error.start}). Save it as UTF-8") from error


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file that a person wrote.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is not UTF-8, too large, or not TOML; the message continues a sentence that names it.
    """
    return parse_toml(read_text(path))


def parse_toml(text: str) -> dict[str, Any]:
    """The tables of a text in TOML.

    Raises:
        ValueError: It is not TOML, or nested too deeply; the message continues a sentence that names it.
    """
    # Reading such keys takes time that grows with the square of their length.
    if (long := re.search(r"(?:(?:[\w-]+|\"[^\"\n]*\"|'[^'\n]*')[ \t]*\.[ \t]*){100}", text)) is not None:
        raise ValueError(f"not valid TOML: a key of more than 100 parts ({long[0][:30]}…)")
    try:
        return tomllib.loads(text)
    except RecursionError as error:
        raise ValueError("not valid TOML: it is nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"not valid TOML: {error}") from error


def write_json(path: Path, value: Any) -> None:
    """Replace `path` by indented JSON atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def sha256(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def is_partial(path: Path) -> bool:
    """Whether a path is named as an unfinished write."""
    return path.name.startswith(".") and _TEMPORARY_MARK in path.name


def remove_partial(folder: Path) -> list[Path]:
    """Delete what interrupted writes left under `folder`, and return the deleted paths.

    Files of live processes and of other machines stay, because a cache may be shared.
    """
    leftovers = [path for path in sorted(folder.rglob(f".*{_TEMPORARY_MARK}*")) if not _is_being_written(path)]
    for leftover in leftovers:
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink(missing_ok=True)
    return leftovers


def _is_being_written(partial: Path) -> bool:
    machine, _, ids = partial.name.rpartition(_TEMPORARY_MARK)[2].partition("-")
    if not ids:
        return False  # written by a version that did not name the machine
    if machine != _MACHINE:
        return True  # another machine's
    pid = int(ids.partition("-")[0])
    # This process writes nothing while this is called, so a file with its ID is from an earlier process.
    return pid != os.getpid() and psutil.pid_exists(pid)
