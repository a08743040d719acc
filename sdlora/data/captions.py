"""Captions: reading them from files, and the text that is trained at each exposure.

`dataset` reads them; `training.data` and `cache` ask for the text of every exposure.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from sdlora.common import seeds
from sdlora.common.bundled import CaptionOptions
from sdlora.common.files import read_text
from sdlora.errors import DataError

METADATA = "metadata.jsonl"
_MOST_CAPTION_BYTES, _MOST_METADATA_BYTES = 1 << 20, 50 << 20
_MOST_LINES, _MOST_FAULTS = 200_000, 20
SIDECARS = frozenset({".txt", ".caption", ".json"})
_WILDCARD = re.compile(r"\{([^{}]*\|[^{}]*)\}")


class FolderCaptions(NamedTuple):
    """The captions of a folder's images.

    Attributes:
        by_image: For every image, its captions by the file that they are in; empty where that is empty or unreadable.
        unused: Caption files, and names in `metadata.jsonl`, that belong to no image.
        faults: Pairs of a file name and a message.
    """

    by_image: dict[str, dict[str, str]]
    unused: list[str]
    faults: list[tuple[str, str]]


def read_captions(folder: Path, images: Collection[str]) -> FolderCaptions:
    """The captions of images, from sidecars (`.txt`, `.caption`, `.json`) and `metadata.jsonl` beside them.

    Sidecars have their image's name with another suffix. Case counts only where two images differ in nothing else.

    Args:
        images: Paths relative to the folder.
    """
    found: dict[str, dict[str, str]] = {name: {} for name in images}
    unused: list[str] = []
    faults: list[tuple[str, str]] = []
    by_name, by_stem = (
        _finder(images, str),
        _finder(images, lambda name: PurePosixPath(name).with_suffix("").as_posix()),
    )

    def read(source: str, file: Path, owners: list[str]) -> None:
        try:
            _refuse_stray(file, source, folder, owners)
            text = caption_in(file, source)
        except DataError as error:
            faults.append((source, str(error)))
            text = None
        if text and not owners:
            unused.append(source)
        for owner in owners:
            found[owner][source] = text or ""

    for parent in sorted({PurePosixPath(), *(PurePosixPath(name).parent for name in images)}):
        shown = sorted(path for path in (folder / parent).iterdir() if not path.name.startswith("."))
        files = [path for path in shown if path.is_file()]
        others = sorted(set(shown) - set(files))
        for odd in (path for path in others if path.suffix.lower() in SIDECARS):
            source = (parent / odd.name).as_posix()
            if by_stem((parent / odd.stem).as_posix()):
                what = "a folder" if odd.is_dir() else "a dead link" if odd.is_symlink() else "no regular file"
                faults.append(
                    (source, f"{source}: {what}, not a caption. Remove it, or write the caption in its place.")
                )
        for file in (path for path in files if path.name == METADATA):
            source = (parent / METADATA).as_posix()
            try:
                _refuse_stray(file, source, folder, images)
            except DataError as error:
                faults.append((source, str(error)))
                continue
            captions, messages = read_metadata(file, source)
            faults += [(source, message) for message in messages]
            for name, text in captions.items():
                owners = by_name((parent / name).as_posix())
                unused += [] if owners else [(parent / name).as_posix()]
                for owner in owners:
                    found[owner][source] = text
        for file in (path for path in files if path.suffix.lower() in SIDECARS):
            owners = by_stem((parent / file.stem).as_posix())
            # A lone JSON file may be anything.
            if owners or file.suffix.lower() != ".json":
                read((parent / file.name).as_posix(), file, owners)
    return FolderCaptions(found, unused, faults)


def _refuse_stray(file: Path, name: str, folder: Path, owners: Collection[str]) -> None:
    """Refuse a caption that is a link to a file elsewhere than in the folder, or beside its own image's file."""
    if not file.is_symlink():
        return
    target = file.resolve()
    beside = {(folder / owner).resolve().parent for owner in owners}
    if not target.is_relative_to(folder.resolve()) and target.parent not in beside:
        raise DataError(f"{name}: a link to {target}, outside of the folder, which is not read. Copy the file here.")


def _finder(images: Collection[str], key: Callable[[str], str]) -> Callable[[str], list[str]]:
    """Finds images by a key, ignoring case unless one has exactly that key."""
    exact: dict[str, list[str]] = {}
    folded: dict[str, list[str]] = {}
    for name in images:
        exact.setdefault(key(name), []).append(name)
        folded.setdefault(key(name).casefold(), []).append(name)
    return lambda wanted: exact.get(wanted) or folded.get(wanted.casefold(), [])


def text_sidecar(image: Path) -> Path:
    """The `.txt` file of an image's caption, whether it exists or not; its name may differ in case."""
    named = [path for path in image.parent.iterdir() if path.stem.casefold() == image.stem.casefold()]
    is_alone = all(path.stem == image.stem for path in named if path.suffix.lower() not in SIDECARS)
    texts = (path for path in sorted(named, reverse=True) if path.suffix.lower() == ".txt")  # ".txt" before ".TXT"
    return next((path for path in texts if path.stem == image.stem or is_alone), image.with_suffix(".txt"))


def caption_in(file: Path, name: str) -> str:
    """The caption in a sidecar, stripped.

    A JSON file holds a string, or an object with "caption" or "text" and "tags", each a string or a list: a list of
    captions becomes lines, tags are joined by commas and follow the caption. An object without them has no caption.

    Raises:
        DataError: It is not UTF-8, or not such a JSON file; the message uses `name` for it, whose suffix counts.
    """
    text = _read_text(file, name)
    if PurePosixPath(name).suffix.lower() != ".json":
        return text.strip()
    try:
        value = json.loads(text)
        entry: dict[str, object] = value if isinstance(value, dict) else {"caption": value}
        captions = [_joined(entry[key], "\n") for key in ("caption", "text") if entry.get(key)]
        tags = _joined(entry.get("tags") or "", ", ")
        # JSON can escape lone surrogates, which are not valid text.
        "\n".join([*captions, tags]).encode()
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(
            f'{name}: expected a string, or an object with "caption", "text" or "tags", each a string or a list of '
            "strings."
        ) from error
    if len(set(captions)) > 1:
        raise DataError(f'{name}: "caption" and "text" differ; remove one.')
    lines = captions[0].split("\n") if captions else []
    return "\n".join(f"{line}, {tags}" if tags else line for line in lines if line) or tags


def _joined(value: object, joint: str) -> str:
    entries = [value] if isinstance(value, str) else value
    if not isinstance(entries, list):
        raise TypeError
    return joint.join(entry.strip() for entry in entries).strip()


def _read_text(file: Path, name: str, most_bytes: int = _MOST_CAPTION_BYTES) -> str:
    try:
        return read_text(file, most_bytes)
    except OSError as error:
        raise DataError(f"{name}: cannot be read ({error.strerror}).") from error
    except ValueError as error:
        raise DataError(f"{name}: {error}.") from error


def read_metadata(file: Path, name: str = METADATA) -> tuple[dict[str, str], list[str]]:
    """The captions of a `metadata.jsonl` by image, stripped and not empty, and error messages, which call it `name`.

    After many lines with errors, the rest is not read.
    """
    captions: dict[str, str] = {}
    lines: dict[str, int] = {}
    try:
        text = _read_text(file, name, _MOST_METADATA_BYTES)
    except DataError as error:
        return {}, [str(error)]
    if (num_lines := text.count("\n")) > _MOST_LINES:
        return {}, [f"{name}: has {num_lines:,} lines; at most {_MOST_LINES:,} are read. Split the set."]
    faults: list[str] = []
    for number, line in enumerate(text.split("\n"), start=1):  # not `splitlines`: captions may hold U+2028
        if len(faults) == _MOST_FAULTS:
            faults.append(f"{name}: reading stopped before line {number}: too many lines have errors.")
            break
        try:
            for image, caption in (_entry(line, f"{name}, line {number}") if line.strip() else {}).items():
                if captions.setdefault(image, caption) != caption:
                    faults.append(
                        f"{name}, line {number}: another caption of {image} is in line {lines[image]}; keep one."
                    )
                lines.setdefault(image, number)
        except DataError as error:
            faults.append(str(error))
    return {image: caption for image, caption in captions.items() if caption}, faults


def _entry(line: str, where: str) -> dict[str, str]:
    try:
        entry = json.loads(line)
        name, text = entry["file_name"], entry["text"]
        # JSON can escape lone surrogates, which are not valid text.
        f"{name}{text}".encode()
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f'{where}: expected {{"file_name": …, "text": …}}.') from error
    if not isinstance(name, str) or not isinstance(text, str):
        raise DataError(f"{where}: file_name and text must be strings.")
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


def fixed_captions(caption: str, options: CaptionOptions, trigger: str | None) -> list[str]:
    """The texts of a caption as written: one, or one for each of its lines, the first of which is evaluated.

    Wildcards are their first alternative, all tags are kept in their order, and the trigger word, prefix and suffix are
    added.
    """
    texts = []
    for line in _lines(caption, options):
        text = _triggered(_with_wildcards(line, options, lambda *_: 0), options, trigger)
        if _is_separated(text, options):
            first, rest, last = _tags(text, options)
            text = ", ".join([*first, *rest, *last])
        texts.append(_framed(text, options))
    return texts


def caption_for_exposure(
    caption: str, options: CaptionOptions, *, trigger: str | None, seed: int, example: str, exposure: int
) -> str:
    """The text that an image is trained on at one exposure; a pure function of the arguments.

    Args:
        caption: The image's caption as written.
        trigger: Put in front if the caption does not contain it.
        example: The image's name.
        exposure: Number of the exposure, from 1.
    """

    def uniform(purpose: str, *more: int | str) -> float:
        return seeds.uniform(seed, purpose, example, exposure, *more)

    if uniform("caption dropout") < options.caption_dropout:
        return ""
    lines = _lines(caption, options)
    # Every line once before any is used again.
    round_, place = divmod(exposure - 1, len(lines))
    line = lines[seeds.permutation(len(lines), seed, "caption line", example, round_)[place]]
    line = _with_wildcards(line, options, lambda count, number: int(uniform("wildcard", number) * count))
    text = _triggered(line, options, trigger)
    if options.shuffle_tags or options.tag_dropout or _is_separated(text, options):
        first, rest, last = _tags(text, options)
        protected = {tag.casefold() for tag in options.protected_tags}
        if options.tag_dropout:
            rest = [
                tag
                for tag in rest
                if tag.casefold() in protected
                or (trigger and has_word(tag, trigger))
                or uniform("tag dropout", tag) >= options.tag_dropout
            ]
        if options.shuffle_tags:
            rest = [rest[index] for index in seeds.permutation(len(rest), seed, "tag order", example, exposure)]
        text = ", ".join([*first, *rest, *last])
    return _framed(text, options)


def lacks_trigger(caption: str, options: CaptionOptions, trigger: str) -> bool:
    """Whether the trigger word is put in front of a caption, or of one of its lines."""
    return any(_triggered(line, options, trigger) != line for line in _lines(caption, options))


def _lines(caption: str, options: CaptionOptions) -> list[str]:
    found = [line.strip() for line in caption.split("\n") if line.strip()] if options.caption_lines else []
    return found or [caption]


def _with_wildcards(text: str, options: CaptionOptions, choose: Callable[[int, int], int]) -> str:
    """The text with one alternative of every wildcard, from the innermost out.

    Args:
        choose: (number of alternatives, number of the wildcard) to the index of an alternative.
    """
    number = 0
    while options.wildcards and (found := _WILDCARD.search(text)) is not None:
        alternatives = found[1].split("|")
        text = text[: found.start()] + alternatives[choose(len(alternatives), number)] + text[found.end() :]
        number += 1
    return text


def _triggered(text: str, options: CaptionOptions, trigger: str | None) -> str:
    """The text with the trigger word in front, unless it, the prefix or the suffix contains it."""
    around = f"{options.caption_prefix} {options.caption_suffix}"
    return text if trigger and has_word(around, trigger) else with_trigger(text, trigger)


def _is_separated(text: str, options: CaptionOptions) -> bool:
    return bool(options.keep_separator) and options.keep_separator in text


def _tags(text: str, options: CaptionOptions) -> list[list[str]]:
    """The tags that stay in front, those that vary, and those that stay at the end."""
    is_separated = _is_separated(text, options)
    parts = text.split(options.keep_separator, 2) if is_separated else [text]
    tags = [[tag.strip() for tag in part.split(",") if tag.strip()] for part in parts]
    if not is_separated:
        tags = [tags[0][: options.keep_tags], tags[0][options.keep_tags :]]
    return [*tags, []][:3]


def _framed(text: str, options: CaptionOptions) -> str:
    """The text between prefix and suffix, each after a space, but for a suffix that starts with punctuation."""
    framed = f"{options.caption_prefix.strip()} {text}" if options.caption_prefix.strip() else text
    suffix = options.caption_suffix.strip()
    return f"{framed}{'' if suffix[0] in ',.;:' else ' '}{suffix}" if suffix else framed


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
