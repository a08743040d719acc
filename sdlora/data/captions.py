"""Captions: reading them from files, and the text that is trained at each exposure.

`dataset` reads them; `training.data` and `cache` ask for the text of every exposure.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from sdlora.common import seeds
from sdlora.errors import DataError

METADATA = "metadata.jsonl"


def read_captions(folder: Path) -> tuple[dict[str, str], list[tuple[str, str]]]:
    """The captions of a folder, from `metadata.jsonl` and `.txt` sidecars.

    Returns:
        Captions by image file name (from `metadata.jsonl`) or "STEM.txt" (from sidecars), stripped and not empty; and
        errors as pairs of a file name and a message.
    """
    captions: dict[str, str] = {}
    faults: list[tuple[str, str]] = []
    metadata = folder / METADATA
    for file in ([metadata] if metadata.is_file() else []) + sorted(folder.glob("*.txt")):
        try:
            text = file.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            where = f"{error.reason} at byte {error.start}"
            faults.append((file.name, f"{file.name}: not valid UTF-8 ({where}). Save it as UTF-8."))
            continue
        if file != metadata:
            captions[file.name] = text.strip()
            continue
        for number, line in enumerate(text.split("\n"), start=1):  # not `splitlines`: captions may hold U+2028
            try:
                captions |= _entry(line, number) if line.strip() else {}
            except DataError as error:
                faults.append((METADATA, str(error)))
    return {name: text for name, text in captions.items() if text}, faults


def _entry(line: str, number: int) -> dict[str, str]:
    try:
        entry = json.loads(line)
        name, text = entry["file_name"], entry["text"]
        # JSON can escape lone surrogates, which are not valid text.
        f"{name}{text}".encode()
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f'{METADATA}, line {number}: expected {{"file_name": …, "text": …}}.') from error
    if not isinstance(name, str) or not isinstance(text, str):
        raise DataError(f"{METADATA}, line {number}: file_name and text must be strings.")
    return {name: text.strip()}


def _word(word: str) -> re.Pattern[str]:
    """Matches a whole word, ignoring case."""
    return re.compile(rf"(?<!\w){re.escape(word)}(?!\w)", flags=re.IGNORECASE)


def has_word(caption: str, word: str) -> bool:
    """Whether a caption contains a whole word, ignoring case."""
    return _word(word).search(caption) is not None


def with_trigger(caption: str, trigger: str | None) -> str:
    """The caption with the trigger word in front, unless it already contains it."""
    if not trigger or has_word(caption, trigger):
        return caption
    return f"{trigger}, {caption}" if caption else trigger


def caption_for_exposure(
    caption: str,
    *,
    trigger: str | None,
    shuffle_tags: bool,
    keep_tags: int,
    dropout: float,
    seed: int,
    example: str,
    exposure: int,
) -> str:
    """The text that an image is trained on at one exposure; a pure function of the arguments.

    Args:
        caption: The image's caption as written.
        trigger: Put in front if the caption does not contain it.
        shuffle_tags: Whether comma-separated tags are shuffled.
        keep_tags: Number of tags that stay in front.
        dropout: Share of exposures with an empty caption, 0 to 1.
        example: The image's name.
        exposure: Number of the exposure, from 1.
    """
    if seeds.uniform(seed, "caption dropout", example, exposure) < dropout:
        return ""
    text = with_trigger(caption, trigger)
    if not shuffle_tags:
        return text
    tags = [tag.strip() for tag in text.split(",") if tag.strip()]
    kept, rest = tags[:keep_tags], tags[keep_tags:]
    order = seeds.permutation(len(rest), seed, "tag order", example, exposure)
    return ", ".join(kept + [rest[index] for index in order])


def prior_caption(
    caption: str, *, trigger: str, class_words: Sequence[str], seed: int, example: str, exposure: int
) -> str:
    """The text at which the base model's prediction is preserved at one exposure.

    At half of the exposures a class word replaces the trigger word. At the other half the caption is empty, since
    classifier-free guidance uses the prediction for it in every image (Ho & Salimans 2207.12598, equation 6).

    Args:
        caption: From `caption_for_exposure`, as are `example` and `exposure`.
        trigger: The word that is replaced.
        class_words: One of them is drawn at random.
    """
    if seeds.uniform(seed, "preserved caption", example, exposure) < 0.5:
        return ""
    drawn = class_words[int(seeds.uniform(seed, "class word", example, exposure) * len(class_words))]
    return _word(trigger).sub(lambda _: drawn, caption)
