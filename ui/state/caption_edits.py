"""Changes of all captions of a set: what each would change, to be looked at before it is done."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Callable
from dataclasses import dataclass

from sdlora.data.captions import with_trigger

from .folders import StudioError
from .image_set import SetView


@dataclass(frozen=True)
class CaptionEdit:
    """The captions that a change of all captions would change: by image, the one before and the one after."""

    captions: dict[str, tuple[str, str]]

    @property
    def after(self) -> dict[str, str]:
        """The new captions by image."""
        return {name: after for name, (_, after) in self.captions.items()}

    @property
    def fingerprint(self) -> str:
        """The same for the same change of the same captions alone."""
        return hashlib.sha256(repr(sorted(self.captions.items())).encode(errors="backslashreplace")).hexdigest()


def changed_captions(view: SetView, change: Callable[[str], str]) -> CaptionEdit:
    """What a change of all captions would change."""
    found = {card.name: (card.caption, change(card.caption)) for card in view.cards}
    return CaptionEdit({name: texts for name, texts in found.items() if texts[0] != texts[1]})


def replace_words(view: SetView, find: str, replacement: str) -> CaptionEdit:
    """Replace words in all captions.

    Raises:
        StudioError: There are no words to find.
    """
    if not find:
        raise StudioError("Enter the words to find.")
    return changed_captions(view, lambda caption: caption.replace(find, replacement))


def prepend_trigger(view: SetView, trigger: str) -> CaptionEdit:
    """Put the trigger in front of captions that do not contain it.

    Raises:
        StudioError: There is no trigger.
    """
    if not trigger.strip():
        raise StudioError("There is no trigger word yet. Enter a made-up word for what you train.")
    return changed_captions(view, lambda caption: with_trigger(caption, trigger.strip()))


def fill_missing_captions(view: SetView, text: str) -> CaptionEdit:
    """Give the same caption to all images that have none.

    Raises:
        StudioError: The caption is empty.
    """
    if not text.strip():
        raise StudioError("Enter the caption for the images that have none.")
    return changed_captions(view, lambda caption: caption or text.strip())


def differences(before: str, after: str) -> list[tuple[str, str]]:
    """Two texts as one, in parts: each is "same", "gone" or "new", and its words."""
    old, new = before.split(), after.split()
    found: list[tuple[str, str]] = []
    for what, a, b, c, d in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if what == "equal":
            found.append(("same", " ".join(old[a:b])))
            continue
        found += [(kind, " ".join(words)) for kind, words in (("gone", old[a:b]), ("new", new[c:d])) if words]
    return found
