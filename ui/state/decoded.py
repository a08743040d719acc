"""Images that were decoded, kept while their files stay the same, and those of large sets decoded in the background.

A page shows a large set before all of its images have been looked at.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from sdlora.data.checks import Image, decode
from sdlora.errors import DataError

_BACKGROUND = "white"
_MOST = 20_000
_FEW = 24
"""So many images are decoded while a page waits."""

_Facts = tuple[str, int, int]
_found: OrderedDict[tuple[Path, str], tuple[_Facts, Image | str]] = OrderedDict()
_lock = threading.Lock()
# Threads that want one image decode it once.
_turns = [threading.Lock() for _ in range(64)]


def _facts(path: Path) -> _Facts:
    facts = path.stat()
    return str(path), facts.st_mtime_ns, facts.st_size


def _known(path: Path, background: str, facts: _Facts) -> Image | str | None:
    with _lock:
        before = _found.get((path, background))
        if before is None or before[0] != facts:
            return None
        _found.move_to_end((path, background))
        return before[1]


def cached_decode(path: Path, background: str) -> Image:
    """`sdlora.data.checks.decode`, whose results are kept while the file stays the same."""
    try:
        facts = _facts(path)
    except FileNotFoundError as error:
        raise DataError(f"{path.name}: it was removed a moment ago.") from error
    found = _known(path, background, facts)
    if found is None:
        with _turns[hash(path) % len(_turns)]:
            found = _known(path, background, facts)
            if found is None:
                found = _decode(path, background)
                with _lock:
                    _found[path, background] = facts, found
                    while len(_found) > _MOST:
                        _found.popitem(last=False)
    if isinstance(found, str):
        raise DataError(found)
    return found


def _decode(path: Path, background: str) -> Image | str:
    try:
        return decode(path, background)
    except DataError as error:
        return str(error)


def _is_decoded(path: Path) -> bool:
    try:
        return _known(path, _BACKGROUND, _facts(path)) is not None
    except FileNotFoundError:
        return True


class Examiner:
    """Decodes the images of sets in threads of its own."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._under_way: set[str] = set()
        self._done: set[str] = set()

    def is_done(self, files: Sequence[Path], key: str) -> bool:
        """Whether images can be looked at without a wait; if not, they are decoded from now on.

        Args:
            files: The images.
            key: The same for the same images.
        """
        with self._lock:
            if key in self._done:
                return True
        waiting = [file for file in files if not _is_decoded(file)]
        if len(waiting) <= _FEW:
            return True
        with self._lock:
            if key not in self._under_way:
                self._under_way.add(key)
                threading.Thread(name="images", target=self._decode, args=(waiting, key), daemon=True).start()
        return False

    def _decode(self, files: Iterable[Path], key: str) -> None:
        rest = iter(files)
        taking = threading.Lock()

        def work() -> None:
            while True:
                with taking:
                    file = next(rest, None)
                if file is None:
                    return
                with suppress(DataError, OSError):  # looking at the set says what is wrong
                    cached_decode(file, _BACKGROUND)

        workers = [threading.Thread(target=work, daemon=True) for _ in range(min(4, os.cpu_count() or 1))]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        with self._lock:
            self._under_way.discard(key)
            self._done.add(key)
