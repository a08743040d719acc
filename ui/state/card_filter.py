"""Which images of a set are shown: all, or those with a finding, with a tag, or with words in their caption."""

from __future__ import annotations

from collections import Counter

from .image_set import Card, SetView

ALL = "all"
_MOST_TAGS = 40
_MOST_WORDS = 4  # in a tag
_FEWEST_TAGS = 3  # in a caption of tags
_KINDS = {
    "unreadable": "Unreadable", "no caption": "Without a caption", "caption": "With contradicting captions",
    "duplicate": "The same image twice", "near-duplicate": "Nearly the same image", "no trigger": "Without the trigger",
    "long caption": "Caption cut off", "too small": "Too small", "cropped": "Cropped", "lone bucket": "Odd shape",
}  # fmt: skip


def tags_of(caption: str) -> list[str]:
    """The tags of a caption that consists of them; none of a sentence."""
    tags = [tag.strip() for tag in caption.split(",") if tag.strip()]
    is_list = len(tags) >= _FEWEST_TAGS and all(
        len(tag.split()) <= _MOST_WORDS and tag[-1] not in ".!?" for tag in tags
    )
    return tags if is_list else []


def choices(view: SetView) -> list[tuple[str, str]]:
    """What can be chosen, each in words and by its key: all images, findings, and the most frequent tags."""
    found = [(f"All images ({len(view.cards)})", ALL)]
    marked = sum(card.severity != "fine" for card in view.cards)
    found += [(f"With something to look at ({marked})", "finding:")] if marked else []
    kinds = Counter({kind: len(_with_finding(view, kind)) for kind in _KINDS})
    found += [(f"{_KINDS[kind]} ({number})", f"finding:{kind}") for kind, number in kinds.items() if number]
    tags = Counter(tag for card in view.cards for tag in dict.fromkeys(tags_of(card.caption)))
    return found + [(f"Tag: {tag} ({number})", f"tag:{tag}") for tag, number in tags.most_common(_MOST_TAGS)]


def chosen(view: SetView, wanted: str) -> tuple[Card, ...]:
    """The cards of a choice, which is a key of `choices` or any words."""
    kind, separator, name = wanted.partition(":")
    if wanted in ("", ALL):
        return view.cards
    if separator and kind == "finding":
        return tuple(_with_finding(view, name))
    if separator and kind == "tag":
        return tuple(card for card in view.cards if name in tags_of(card.caption))
    return tuple(card for card in view.cards if wanted.lower() in card.caption.lower())


def _with_finding(view: SetView, kind: str) -> list[Card]:
    """The cards with a kind of finding, or with any."""
    if not kind:
        return [card for card in view.cards if card.severity != "fine"]
    named = {name for finding in view.findings if finding.kind == kind for name in finding.files}
    return [card for card in view.cards if card.name in named]
