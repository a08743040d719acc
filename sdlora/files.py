"""Writing files so that a reader, or a crash, only ever sees the old content or the new one.

Floor 0. A file is written beside its place under a temporary name, flushed to the disk and renamed.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sdlora.errors import DiskFullError, OutputError

_TEMPORARY_MARK = ".sdlora-partial-"


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` when the block ends without an error.

    Raises:
        DiskFullError: The disk is full. The old file, if there was one, is untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path)
    try:
        with _naming_a_full_disk(path):
            yield temporary
            with temporary.open("rb") as handle:
                os.fsync(handle.fileno())
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder; it becomes `path` when the block ends without an error, and is gone otherwise.

    Raises:
        OutputError: `path` is there already.
        DiskFullError: The disk is full.
    """
    if path.exists():
        raise OutputError(f"{path} exists already. Give another name, or move it away.")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path)
    try:
        with _naming_a_full_disk(path):
            temporary.mkdir()
            yield temporary
            temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _beside(path: Path) -> Path:
    """A temporary name that no other process has, and no other thread."""
    return path.with_name(f".{path.name}{_TEMPORARY_MARK}{os.getpid()}-{threading.get_ident()}")


@contextmanager
def _naming_a_full_disk(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFullError(f"No room left on the disk to write {path}. Free some space and try again.") from error
        raise


def write_bytes(path: Path, content: bytes) -> None:
    """Replace `path` by `content` atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, content: str) -> None:
    """Replace `path` by UTF-8 text atomically."""
    write_bytes(path, content.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Replace `path` by indented JSON atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def sha256(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def remove_partial(folder: Path) -> list[Path]:
    """Delete what interrupted writes left behind under `folder`; returns the paths removed."""
    leftovers = sorted(folder.rglob(f".*{_TEMPORARY_MARK}*"))
    for leftover in leftovers:
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink(missing_ok=True)
    return leftovers
