"""An image set as it is shown: what the data checks say about each image, and captions as training reads them.

A set is a folder of images, or of kohya's `REPEATS_NAME` folders, as the configuration reads it. `set_editor` decides
what may be changed; here are the files of captions.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from sdlora.common.bundled import BucketOptions, ImageFolder
from sdlora.common.files import write_text
from sdlora.common.text import format_bytes
from sdlora.config.schema_data import DataConfig
from sdlora.config.toml import parse_config
from sdlora.data.batches import assign_buckets
from sdlora.data.captions import METADATA, read_captions, text_sidecar
from sdlora.data.checks import Finding, Image, copies_between, examine, image_files
from sdlora.data.fit import examine_lengths, examine_sizes

from .decoded import cached_decode
from .folders import StudioError
from .token_windows import Reading
from .uploads import MOST_CAPTION_BYTES


@dataclass(frozen=True)
class Card:
    """An image of a set."""

    name: str  # its path in the set's folder
    caption: str  # empty if there is none
    size: tuple[int, int] | None  # width and height in pixels; None if it cannot be read
    severity: str  # the worst finding: "error", "warning" or "fine"; "unchecked" before it was looked at
    findings: tuple[str, ...]  # a sentence per finding
    bucket: tuple[int, int] | None  # width and height it is trained at, in pixels; None if it cannot be read
    common_caption: str = ""  # what it is trained on without a caption of its own
    reading: Reading | None = None  # how much of its caption is read; None if that was not asked for


@dataclass(frozen=True)
class SetView:
    """The content of a set: its images by name, all findings, and groups of duplicates and near-duplicates."""

    folder: Path
    cards: tuple[Card, ...]
    findings: tuple[Finding, ...]
    twins: tuple[tuple[str, ...], ...]
    preserved: tuple[str, int] | None = None  # kohya's folder of images to preserve, and their number
    is_checked: bool = True  # whether its images were looked at


# --- Which images -----------------------------------------------------------------------------------------------------


def read_folder(folder: Path, taken_out: Collection[str] = ()) -> DataConfig:
    """A set's folder as a run reads it: itself, or a set for each of kohya's folders in it."""
    return parse_config({"data": {"folder": str(folder), "exclude": sorted(taken_out)}}, name="set").data


def images_of(folder: Path) -> dict[str, Path]:
    """All images of a set by name, those that are taken out included; none if there is no folder."""
    if not folder.is_dir():
        return {}
    files = [path for one in read_folder(folder).sets for path in image_files(Path(one.folder))]
    return {path.relative_to(folder).as_posix(): path for path in files}


def fingerprint(folder: Path) -> str:
    """A value that changes when images are added to a set, removed or replaced."""
    facts: list[tuple[str, int, int]] = []
    for name, path in images_of(folder).items():
        with suppress(FileNotFoundError):  # removed at this moment
            facts.append((name, path.stat().st_mtime_ns, path.stat().st_size))
    return hashlib.sha256(repr((str(folder), facts)).encode()).hexdigest()[:16]


def state(folder: Path) -> str:
    """A value that changes when any file of a set does, captions included."""
    return hashlib.sha256(repr(sorted(_files_in(folder))).encode("utf-8", "surrogateescape")).hexdigest()


def _files_in(folder: str | Path) -> Iterator[tuple[str, int, int]]:
    with os.scandir(folder) as found:
        for entry in found:
            if entry.is_dir(follow_symlinks=False):
                yield from _files_in(entry.path)
            with suppress(OSError):  # removed at this moment, or a link to nothing
                facts = entry.stat()
                yield entry.path, facts.st_mtime_ns, facts.st_size


def first_look(folder: Path, taken_out: Collection[str] = ()) -> SetView:
    """A set with its captions before its images are looked at, which takes seconds if there are many."""
    found = captions_of(folder)
    cards = (Card(name, text, None, "unchecked", (), None) for name, text in found.items() if name not in taken_out)
    return SetView(folder, tuple(cards), (), (), is_checked=False)


def view(
    folder: Path,
    *,
    trigger: str | None = None,
    resolution_px: int = 512,
    taken_out: Collection[str] = (),
    read: Callable[[str], Reading] | None = None,
) -> SetView:
    """Read and check a set, which may have no images.

    Args:
        folder: Of the set.
        trigger: The word that captions should contain.
        resolution_px: Training resolution, for buckets and for finding images that are too small.
        taken_out: Images that are left out.
        read: Counts the tokens of a caption; None counts none.
    """
    images = images_of(folder)
    if not images.keys() - set(taken_out):
        return SetView(folder, (), (), ())
    data = read_folder(folder, taken_out)
    findings: list[Finding] = []
    sets: dict[str, tuple[Image, ...]] = {}
    cards: list[Card] = []
    for one in data.sets:
        prefix = _prefix(folder, one)
        if not image_files(Path(one.folder)) or all(name in taken_out for name in images if name.startswith(prefix)):
            continue
        checkup = examine(
            Path(one.folder), background="white", caption=one.caption, trigger=trigger, exclude=one.exclude,
            decode=cached_decode,
        )  # fmt: skip
        sets[prefix.removesuffix("/")] = checkup.images
        ours = (finding for finding in checkup.findings if finding.kind != "unused exclude")
        findings += [finding.of_set(prefix.removesuffix("/") or None) for finding in ours]
        cards += [
            Card(prefix + name, caption, None, "fine", (), None, one.caption or "")
            for name, caption in checkup.captions.items()
        ]
    findings += copies_between(sets)
    sizes = {
        f"{name}/{image.name}" if name else image.name: image.size for name, some in sets.items() for image in some
    }
    assigned = assign_buckets(list(sizes.values()), resolution_px, BucketOptions())
    buckets = dict(zip(sizes, assigned, strict=True))
    findings += [finding for finding in examine_sizes(sizes, buckets) if finding.kind == "too small"]
    cards = [replace(card, reading=read(card.caption or card.common_caption)) for card in cards] if read else cards
    lengths = {card.name: card.reading for card in cards if card.reading is not None}
    for most in {reading.most for reading in lengths.values()}:
        findings += examine_lengths({name: reading.num_tokens for name, reading in lengths.items()}, most)
    twins = tuple(f.files for f in findings if f.kind in ("duplicate", "near-duplicate"))
    checked = tuple(_checked(card, findings, sizes, buckets) for card in cards)
    return SetView(folder, checked, tuple(findings), twins, _preserved(folder, data))


def _prefix(folder: Path, one: ImageFolder) -> str:
    """What the names of the images in one of a set's folders begin with."""
    inside = Path(one.folder).relative_to(folder).as_posix()
    return "" if inside == "." else f"{inside}/"


def _checked(
    card: Card,
    findings: list[Finding],
    sizes: Mapping[str, tuple[int, int]],
    buckets: Mapping[str, tuple[int, int]],
) -> Card:
    about = [finding for finding in findings if card.name in finding.files]
    severity = min((finding.severity for finding in about), default="fine")
    told = tuple(_about(card.name, finding) for finding in about)
    return replace(card, size=sizes.get(card.name), severity=severity, findings=told, bucket=buckets.get(card.name))


def _preserved(folder: Path, data: DataConfig) -> tuple[str, int] | None:
    if data.preservation_folder is None:
        return None
    place = Path(data.preservation_folder)
    name = place.relative_to(folder).as_posix() if place.is_relative_to(folder) else str(place)
    return name, len(image_files(place))


def _about(name: str, finding: Finding) -> str:
    """A finding as it concerns one image."""
    if finding.kind in ("duplicate", "near-duplicate"):
        others = ", ".join(other for other in finding.files if other != name)
        same = "The same image as" if finding.kind == "duplicate" else "Nearly the same image as"
        return f"{same} {others}. Press “Take out” on all but one: duplicates are memorized first."
    if finding.kind == "unreadable":
        return f"{finding.message} Press “Take out”, or drop a copy that opens in an image viewer."
    return {
        "no caption": "It has no caption. Describe what is in the image.",
        "no trigger": "Its caption does not contain the trigger word, which is put in front of it in training.",
        "too small": "It is smaller than the training size and will be enlarged. A larger original is sharper.",
        "cropped": "More than a fifth of it is cropped off, outside the frame. Crop it yourself to what matters.",
        "lone bucket": "No other image has its shape. Crop it to the shape of others.",
        "long caption": "Its caption is too long, and its end is not read. Shorten it.",
        "caption": "Its caption files contradict each other. Type the caption that it should have: that one is kept.",
    }.get(finding.kind, finding.message)


# --- Captions ---------------------------------------------------------------------------------------------------------


def captions_of(folder: Path) -> dict[str, str]:
    """The captions of all images of a set, by name; empty where there is none."""
    found: dict[str, str] = {}
    by_parent: dict[Path, list[tuple[str, str]]] = {}
    for name, path in images_of(folder).items():
        by_parent.setdefault(path.parent, []).append((name, path.name))
    for parent, names in by_parent.items():
        captions = read_captions(parent, [file for _, file in names]).by_image
        found |= {name: next(filter(None, captions[file].values()), "") for name, file in names}
    return found


def write_captions(folder: Path, captions: Mapping[str, str]) -> None:
    """Save captions of images, by name, in a `.txt` file beside each.

    Raises:
        StudioError: There is no such image in the set, or a caption is too long.
    """
    images = images_of(folder)
    texts: dict[Path, dict[str, str]] = {}
    for name, text in captions.items():
        if name not in images:
            raise StudioError(f"There is no image {name!r} in this set any more. Reload the page.")
        caption = " ".join(text.replace("\0", " ").split()).encode("utf-8", errors="replace").decode("utf-8")
        if len(caption.encode()) > MOST_CAPTION_BYTES:
            raise StudioError(f"The caption of {name} is longer than {format_bytes(MOST_CAPTION_BYTES)}. Shorten it.")
        texts.setdefault(images[name].parent, {})[images[name].name] = caption
    for parent, some in texts.items():
        _split_metadata(parent)
        found = read_captions(parent, [path.name for path in image_files(parent)]).by_image
        for name, caption in some.items():
            for other in found[name]:
                if not other.lower().endswith(".txt"):  # it would contradict the new caption
                    (parent / other).rename(parent / f"{other}.before")
            write_text(text_sidecar(parent / name), caption)


def caption_files(folder: Path, image: str) -> list[str]:
    """The files, by their path in a set's folder, that hold the caption of an image and of no other.

    Raises:
        StudioError: There is no such image in the set.
    """
    path = images_of(folder).get(image)
    if path is None:
        raise StudioError(f"There is no image {image!r} in this set any more. Reload the page.")
    captions = read_captions(path.parent, [file.name for file in image_files(path.parent)]).by_image
    shared = {file for name, found in captions.items() if name != path.name for file in found}
    own = sorted(set(captions[path.name]) - shared - {METADATA})
    return [(path.parent / file).relative_to(folder).as_posix() for file in own]


def _split_metadata(folder: Path) -> None:
    """Turn `metadata.jsonl` into a caption file per image, because the two could contradict each other."""
    if not (folder / METADATA).is_file():
        return
    files = image_files(folder)
    for name, found in read_captions(folder, [path.name for path in files]).by_image.items():
        if METADATA in found and not any(file != METADATA and text for file, text in found.items()):
            write_text(text_sidecar(folder / name), found[METADATA])
    (folder / METADATA).rename(folder / f"{METADATA}.before")
