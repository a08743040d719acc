"""Preview prompts that put the trained concept into new places.

Pure. Called when a run is set up.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import takewhile

_PLACES = (
    "in a green meadow",
    "at night under the stars",
    "by the sea",
    "in a snowy forest",
    "in a city street",
    "on top of a mountain",
    "in a room with a red wall",
    "under water",
    "in a library",
    "on the moon",
)


def novel_prompts(captions: Sequence[str], trigger: str | None, count: int) -> list[str]:
    """Up to ten prompts of the trigger, or of the captions' common beginning, in the places they mention least."""
    known = set(_words(" ".join(captions)))
    least_known = sorted(_PLACES, key=lambda place: sum(word in known for word in _words(place) if len(word) > 3))
    return [f"{concept(captions, trigger)} {place}" for place in least_known[:count]]


def concept(captions: Sequence[str], trigger: str | None) -> str:
    """What the set is about: the trigger, or else the captions' common beginning."""
    return trigger or _common_beginning(captions) or "a picture"


def _common_beginning(captions: Sequence[str]) -> str:
    """The words that all captions begin with, without trailing short ones such as "in" or "a"."""
    if len(captions) < 2:
        return ""
    columns = zip(*(re.findall(r"[^\s,.]+", caption) for caption in captions), strict=False)
    words = [column[0] for column in takewhile(lambda column: len(set(column)) == 1, columns)]
    while words and len(words[-1]) < 4:
        words = words[:-1]
    return " ".join(words)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())
