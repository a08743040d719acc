"""What tabs show of a run and of a set, kept here so that a tab asks for news with a few bytes.

A tab holds a token in place of it. A token that is not known, such as one from before the studio was started again,
means that everything may have changed.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field

_MOST = 1000


@dataclass(frozen=True)
class Look:
    """What a tab looks at, and a digest of every part that it shows.

    Attributes:
        run: The run that was chosen, if any.
        epoch: The epoch of the copy check.
        images: The set of images.
        drawn: The fingerprint of what is drawn of it.
        digests: By part.
    """

    run: str | None = None
    epoch: str | None = None
    images: str = ""
    drawn: str = ""
    digests: Mapping[str, str] = field(default_factory=dict)


class Looks:
    """The looks of all tabs by their tokens; the same look has the same token."""

    def __init__(self) -> None:
        self._found: OrderedDict[str, Look] = OrderedDict()
        self._lock = threading.Lock()

    def keep(self, look: Look) -> str:
        """Remember a look; returns its token."""
        token = hashlib.sha256(repr(look).encode()).hexdigest()[:16]
        with self._lock:
            self._found[token] = look
            self._found.move_to_end(token)
            if len(self._found) > _MOST:
                self._found.popitem(last=False)
        return token

    def find(self, token: str) -> Look | None:
        """The look of a token, if it is known."""
        with self._lock:
            if token in self._found:
                self._found.move_to_end(token)
            return self._found.get(token)
