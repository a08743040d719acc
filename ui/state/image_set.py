"""An image set as it is edited: what the data checks say about each image, and its captions.

Captions are saved at once to `.txt` files beside the images, as training reads them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sdlora.common.bundled import BucketOptions
from sdlora.common.files import write_text
from sdlora.common.text import format_bytes
from sdlora.data.batches import assign_buckets
from sdlora.data.captions import METADATA, read_captions, text_sidecar, with_trigger
from sdlora.data.checks import Finding, Image, decode, examine, image_files
from sdlora.data.fit import examine_sizes
from sdlora.errors import DataError

from .folders import StudioError
from .uploads import MOST_CAPTION_BYTES


@dataclass(frozen=True)
class Card:
    """An image of a set."""

    name: str
    caption: str  # empty if there is none
    size: tuple[int, int] | None  # width and height in pixels; None if it cannot be read
    severity: str  # the worst finding: "error", "warning" or "fine"
    findings: tuple[str, ...]  # a sentence per finding
    bucket: tuple[int, int] | None  # width and height it is trained at, in pixels; None if it cannot be read


@dataclass(frozen=True)
class SetView:
    """The content of a set: its images by name, all findings, and groups of duplicates and near-duplicates."""

    folder: Path
    cards: tuple[Card, ...]
    findings: tuple[Finding, ...]
    twins: tuple[tuple[str, ...], ...]


@functools.lru_cache(maxsize=4096)
def _decode(path: Path, background: str, _modified_ns: int, _size: int) -> Image | str:
    """The result of decoding a file, cached until the file changes."""
    try:
        return decode(path, background)
    except DataError as error:
        return str(error)


def _cached_decode(path: Path, background: str) -> Image:
    facts = path.stat()
    found = _decode(path, background, facts.st_mtime_ns, facts.st_size)
    if isinstance(found, str):
        raise DataError(found)
    return found


def view(folder: Path, *, trigger: str | None = None, resolution_px: int = 512) -> SetView:
    """Read and check a set, which may have no images.

    Args:
        folder: Of the set.
        trigger: The word that captions should contain.
        resolution_px: Training resolution, for buckets and for finding images that are too small.
    """
    if not folder.is_dir() or not any(image_files(folder)):
        return SetView(folder, (), (), ())
    checkup = examine(folder, background="white", trigger=trigger, decode=_cached_decode)
    sizes = {image.path.name: image.size for image in checkup.images}
    assigned = assign_buckets(list(sizes.values()), resolution_px, BucketOptions())
    buckets = dict(zip(sizes, assigned, strict=True))
    small = [finding for finding in examine_sizes(sizes, buckets) if finding.kind == "too small"]
    findings = (*checkup.findings, *small)
    files = image_files(folder)
    captions = read_captions(folder, [path.name for path in files]).by_image
    cards = []
    for path in files:
        about = [finding for finding in findings if path.name in finding.files]
        caption = next(filter(None, captions[path.name].values()), "")
        severity = min((finding.severity for finding in about), default="fine")
        told = tuple(_about(path.name, finding) for finding in about)
        cards.append(Card(path.name, caption, sizes.get(path.name), severity, told, buckets.get(path.name)))
    twins = tuple(f.files for f in findings if f.kind in ("duplicate", "near-duplicate"))
    return SetView(folder, tuple(cards), findings, twins)


def _about(name: str, finding: Finding) -> str:
    """A finding as it concerns one image."""
    if finding.kind in ("duplicate", "near-duplicate"):
        others = ", ".join(other for other in finding.files if other != name)
        same = "The same image as" if finding.kind == "duplicate" else "Nearly the same image as"
        return f"{same} {others}. Keep one of them: duplicates are memorized first."
    if len(finding.files) == 1:
        return finding.message
    return {
        "no caption": "It has no caption. Describe what is in the image.",
        "no trigger": "Its caption does not contain the trigger, which is prepended in training.",
        "too small": "It is smaller than the training resolution and will be enlarged.",
    }.get(finding.kind, finding.message)


# --- Captions ---------------------------------------------------------------------------------------------------------


def write_caption(folder: Path, image: str, text: str) -> None:
    """Save the caption of an image.

    Raises:
        StudioError: There is no such image in the set, or the caption is too long.
    """
    path = _image(folder, image)
    caption = " ".join(text.replace("\0", " ").split())
    if len(caption.encode("utf-8", errors="replace")) > MOST_CAPTION_BYTES:
        raise StudioError(f"The caption of {image} is longer than {format_bytes(MOST_CAPTION_BYTES)}. Shorten it.")
    _split_metadata(folder)
    for other in read_captions(folder, [file.name for file in image_files(folder)]).by_image[image]:
        if not other.lower().endswith(".txt"):  # it would contradict the new caption
            (folder / other).rename(folder / f"{other}.before")
    write_text(text_sidecar(path), caption.encode("utf-8", errors="replace").decode("utf-8"))


def replace_words(folder: Path, find: str, replacement: str) -> int:
    """Replace words in all captions of a set; returns the number of captions changed.

    Raises:
        StudioError: There are no words to find.
    """
    if not find:
        raise StudioError("Enter the words to find.")
    return _rewrite(folder, lambda caption: caption.replace(find, replacement))


def prepend_trigger(folder: Path, trigger: str) -> int:
    """Prepend the trigger to every caption without it; returns the number of captions changed.

    Raises:
        StudioError: There is no trigger.
    """
    if not trigger.strip():
        raise StudioError("There is no trigger yet. Choose a made-up word for what you train.")
    return _rewrite(folder, lambda caption: with_trigger(caption, trigger.strip()))


def fill_missing_captions(folder: Path, text: str) -> int:
    """Give all images without a caption the same one; returns the number of them."""
    uncaptioned = [card.name for card in view(folder).cards if not card.caption]
    for name in uncaptioned:
        write_caption(folder, name, text)
    return len(uncaptioned)


def remove_image(folder: Path, image: str) -> None:
    """Remove an image and its caption from a set."""
    path = _image(folder, image)
    captions = read_captions(folder, [file.name for file in image_files(folder)]).by_image
    shared = {file for name, found in captions.items() if name != image for file in found}
    path.unlink()
    for file in set(captions[image]) - shared - {METADATA}:
        (folder / file).unlink()


def _rewrite(folder: Path, change: Callable[[str], str]) -> int:
    changed = {card.name: change(card.caption) for card in view(folder).cards if change(card.caption) != card.caption}
    for name, caption in changed.items():
        write_caption(folder, name, caption)
    return len(changed)


def _image(folder: Path, name: str) -> Path:
    found = next((path for path in image_files(folder) if path.name == name), None) if folder.is_dir() else None
    if found is None:
        raise StudioError(f"There is no image {name!r} in this set. Reload the page; it may have been removed.")
    return found


def _split_metadata(folder: Path) -> None:
    """Turn `metadata.jsonl` into a caption file per image, because the two could contradict each other."""
    if not (folder / METADATA).is_file():
        return
    files = image_files(folder)
    for name, found in read_captions(folder, [path.name for path in files]).by_image.items():
        if METADATA in found and not any(file != METADATA and text for file, text in found.items()):
            write_text(text_sidecar(folder / name), found[METADATA])
    (folder / METADATA).rename(folder / f"{METADATA}.before")
