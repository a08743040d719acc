"""The dataset's doctor: everything that is wrong or doubtful about a folder of images, file by file.

`load_dataset` refuses what is an error here and passes warnings on; `sdlora data` shows both.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from sdlora.data.buckets import Bucket
from sdlora.data.captions import METADATA, has_word, read_captions
from sdlora.data.duplicates import near_duplicates, thumbnail
from sdlora.data.images import SUFFIXES, load_image, pixel_hash
from sdlora.data.masks import END, MaskKind, load_mask, sort_masks
from sdlora.errors import DataError

Kind = Literal[
    "unreadable", "caption", "no caption", "subfolder", "unused caption", "duplicate", "near-duplicate", "no trigger",
    "too small", "lone bucket", "mask", "lone mask", "no mask", "unused mask",
]  # fmt: skip


NUM_NAMED = 5


@dataclass(frozen=True)
class Finding:
    """Something to mend.

    Attributes:
        kind: What it is.
        severity: "error" where training refuses the folder.
        files: The names of all files it is about.
        message: What is wrong and what to do; of more than five files it names the first five.
    """

    kind: Kind
    severity: Literal["error", "warning"]
    files: tuple[str, ...]
    message: str


@dataclass(frozen=True, eq=False)
class Image:
    """An image that could be read.

    Attributes:
        path: Where it is.
        caption: Its caption as written, or the one for all; None if there is neither or it cannot be read.
        size: Width and height in pixels.
        pixels: The hash of its pixels.
        thumbnail: (n,), see `sdlora.data.duplicates`.
        mask: Its mask, the image itself where that is its alpha channel; None if all of it counts.
    """

    path: Path
    caption: str | None
    size: Bucket
    pixels: str
    thumbnail: NDArray[np.float32]
    mask: Path | None = None


@dataclass(frozen=True, eq=False)
class Look:
    """What decoding an image gives; the attributes are those of `Image`."""

    size: Bucket
    pixels: str
    thumbnail: NDArray[np.float32]


@dataclass(frozen=True)
class Checkup:
    """What was found in a folder.

    Attributes:
        num_files: How many images there are, those included that cannot be read.
        images: Those that can be read, by name.
        findings: What is wrong.
    """

    num_files: int
    images: tuple[Image, ...]
    findings: tuple[Finding, ...]


def look_at(path: Path, background: str) -> Look:
    """Decode an image.

    Raises:
        DataError: It cannot be read.
    """
    image = load_image(path, background)
    return Look(image.size, pixel_hash(image), thumbnail(image))


def examine(
    folder: Path,
    *,
    background: str,
    caption: str | None = None,
    trigger: str | None = None,
    allow_trigger_only: bool = False,
    masks: MaskKind = "none",
    look: Callable[[Path, str], Look] = look_at,
) -> Checkup:
    """Look at every image and caption of a folder, each image decoded once.

    Args:
        folder: Read flat.
        background: Colour under transparent pixels.
        caption: For images that have no caption of their own.
        trigger: The word that captions should hold.
        allow_trigger_only: Whether images may do without a caption, where there is a trigger.
        masks: Where masks are looked for.
        look: Decodes an image, or remembers what that gave.

    Raises:
        DataError: The folder is missing or holds no images.
    """
    files, mask_files, lone = sort_masks(_image_files(folder), masks)
    if not files:
        raise DataError(f"The folder {str(folder)!r} holds nothing but masks. Put their images beside them.")
    captions, faults = read_captions(folder)
    findings = [Finding("caption", "error", (name,), message) for name, message in faults]
    broken = {name for name, _ in faults}
    images: list[Image] = []
    uncaptioned: list[str] = []
    for path in files:
        shown = path.name.encode("utf-8", errors="backslashreplace").decode("utf-8")
        if shown != path.name:
            message = f"{shown}: its name is no text in UTF-8. Rename it."
            findings.append(Finding("unreadable", "error", (shown,), message))
            continue
        own, conflict = _own_caption(path, captions)
        findings += conflict
        text = caption if own is None else own
        # A caption that cannot be read is told as that, not as missing, too.
        if text is None and not (trigger and allow_trigger_only) and not broken & {METADATA, f"{path.stem}.txt"}:
            uncaptioned.append(path.name)
        try:
            seen = look(path, background)
        except DataError as error:
            findings.append(Finding("unreadable", "error", (path.name,), str(error)))
            continue
        mask, faulty = _mask(path, seen.size, mask_files, masks)
        findings += faulty
        images.append(Image(path, text, seen.size, seen.pixels, seen.thumbnail, mask))
    findings += _uncaptioned(uncaptioned, len(files))
    findings += _left_out(folder, files, captions)
    findings += _copies(images)
    findings += _without_trigger(images, trigger)
    findings += _doubts_about_masks(images, mask_files, lone, masks)
    return Checkup(len(files), tuple(images), tuple(findings))


def examine_sizes(sizes: Mapping[str, Bucket], buckets: Mapping[str, Bucket]) -> list[Finding]:
    """Look at whether images suit the sizes they are trained at.

    Args:
        sizes: The images' own widths and heights in pixels, by name.
        buckets: The same for their buckets.
    """
    small = {
        name: f"{name} ({width} x {height} for {buckets[name][0]} x {buckets[name][1]})"
        for name, (width, height) in sizes.items()
        if width < buckets[name][0] or height < buckets[name][1]
    }
    used = Counter(buckets.values())
    alone = {name: f"{name} ({b[0]} x {b[1]})" for name, b in buckets.items() if used[b] == 1 < len(buckets)}
    found: list[Finding] = []
    if small:
        message = (
            f"{_count(small)} smaller than the training size and will be enlarged: {some(list(small.values()))}. "
            "Take larger originals, or lower data.resolution_px."
        )
        found.append(Finding("too small", "warning", tuple(small), message))
    if alone:
        message = (
            f"{_count(alone)} alone in a bucket, in a batch with no other: {some(list(alone.values()))}. "
            "Crop to the shape of others, add images of that shape, or set data.buckets = false."
        )
        found.append(Finding("lone bucket", "warning", tuple(alone), message))
    return found


def copies_between(sets: Mapping[str, Sequence[Image]]) -> list[Finding]:
    """Images of one set that are in another, too.

    Args:
        sets: Images by the name of their set, which is put in front of theirs.
    """
    if len(sets) < 2:
        return []
    renamed = {
        name: [replace(image, path=Path(name, image.path.name)) for image in images] for name, images in sets.items()
    }
    found = _copies([image for images in renamed.values() for image in images], whole_path=True)
    return [finding for finding in found if len({Path(file).parent for file in finding.files}) > 1]


def warnings_in_short(findings: Sequence[Finding]) -> list[str]:
    """One sentence for each kind of warning, for a run's notices."""
    groups: dict[Kind, list[Finding]] = {}
    for finding in findings:
        if finding.severity == "warning":
            groups.setdefault(finding.kind, []).append(finding)
    return [found[0].message if len(found) == 1 else _many_groups(found) for found in groups.values()]


def some(names: Sequence[str], joint: str = ", ") -> str:
    """The first five of a list in words, and how many more there are."""
    more = f" and {len(names) - NUM_NAMED} more" if len(names) > NUM_NAMED else ""
    return joint.join(names[:NUM_NAMED]) + more


def _count(names: Mapping[str, str]) -> str:
    return "1 image is" if len(names) == 1 else f"{len(names)} images are"


def _image_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise DataError(f"There is no folder {str(folder)!r}. Check its spelling; it is looked up from where you are.")
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.suffix.lower() in SUFFIXES)
    if not files:
        kinds = ", ".join(sorted(SUFFIXES))
        raise DataError(f"The folder {str(folder)!r} holds no images ({kinds}).")
    return files


def _own_caption(path: Path, captions: Mapping[str, str]) -> tuple[str | None, list[Finding]]:
    sidecar, listed = captions.get(f"{path.stem}.txt"), captions.get(path.name)
    if sidecar is None or listed is None or sidecar == listed:
        return sidecar or listed, []
    message = f"{path.name}: {path.stem}.txt and {METADATA} give two different captions; remove one."
    return sidecar, [Finding("caption", "error", (path.name,), message)]


def _uncaptioned(names: list[str], num_files: int) -> list[Finding]:
    if not names:
        return []
    message = (
        f"{len(names)} of {num_files} images have no caption: {some(names)}. Write one into "
        "NAME.txt beside each, or set data.caption for all, or data.trigger with data.allow_trigger_only."
    )
    return [Finding("no caption", "error", tuple(names), message)]


def _left_out(folder: Path, files: list[Path], captions: Mapping[str, str]) -> list[Finding]:
    found: list[Finding] = []
    folders = (path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    # A subfolder `holdout` holds validation images, which must not be trained on.
    subfolders = sorted(name for name in folders if name != "holdout")
    if subfolders:
        message = f"Subfolders of {folder.name} are not read: {some(subfolders)}. Move their images up to train them."
        found.append(Finding("subfolder", "warning", tuple(subfolders), message))
    used = {path.name for path in files} | {f"{path.stem}.txt" for path in files}
    unused = sorted(set(captions) - used)
    if unused:
        message = f"Captions without an image: {some(unused)}. Name them as their images, or take them out."
        found.append(Finding("unused caption", "warning", tuple(unused), message))
    return found


def _copies(images: list[Image], *, whole_path: bool = False) -> list[Finding]:
    same: dict[str, list[Image]] = {}
    for image in images:
        same.setdefault(image.pixels, []).append(image)
    groups = [group for group in same.values() if len(group) > 1]
    found = [_group("duplicate", "the same image", group, whole_path=whole_path) for group in groups]
    distinct = [group[0] for group in same.values()]
    if distinct:
        for indices in near_duplicates(np.stack([image.thumbnail for image in distinct])):
            similar = [distinct[index] for index in indices]
            found.append(_group("near-duplicate", "near-duplicates", similar, whole_path=whole_path))
    return found


def _group(kind: Kind, what: str, images: list[Image], *, whole_path: bool) -> Finding:
    names = tuple(image.path.as_posix() if whole_path else image.path.name for image in images)
    return Finding(kind, "warning", names, f"{some(names, ' and ')} are {what}; keep one of them.")


def _many_groups(found: Sequence[Finding]) -> str:
    what = "pairs" if all(len(finding.files) == 2 for finding in found) else "groups"
    groups = some([some(finding.files, " and ") for finding in found])
    return f"{len(found)} {found[0].kind} {what}: {groups}; keep one of each."


def _without_trigger(images: list[Image], trigger: str | None) -> list[Finding]:
    captioned = [image for image in images if image.caption]
    names = [p.path.name for p in captioned if trigger and p.caption and not has_word(p.caption, trigger)]
    if not names:
        return []
    message = (
        f"{len(names)} of {len(captioned)} captions do not hold the trigger {trigger!r}: {some(names)}. "
        "It is put in front of them; write it in yourself where it should stand elsewhere."
    )
    return [Finding("no trigger", "warning", tuple(names), message)]


def _mask(path: Path, size: Bucket, files: Mapping[str, Path], kind: MaskKind) -> tuple[Path | None, list[Finding]]:
    """An image's mask, and what is wrong with it."""
    mask = {"none": None, "alpha": path, "file": files.get(path.stem)}[kind]
    if mask is None:
        return None, []
    try:
        image = load_mask(mask, path)
    except DataError as error:
        return None, [Finding("mask", "error", (mask.name,), str(error))]
    if image is None:
        return None, []
    fault = None
    if image.size != size:
        own, other = (f"{width} x {height}" for width, height in (size, image.size))
        fault = f"{mask.name} has {other} pixels and its image {own}; save it in the image's size."
    elif image.getextrema() == (0, 0):
        fault = f"The mask of {path.name} hides all of it; mend it, or take the image out."
    return mask, [] if fault is None else [Finding("mask", "error", (mask.name,), fault)]


def _doubts_about_masks(
    images: list[Image], files: Mapping[str, Path], lone: list[Path], kind: MaskKind
) -> list[Finding]:
    found: list[Finding] = []
    if lone:
        names = tuple(path.name for path in lone)
        message = f"Masks without an image: {some(names)}. A mask is called as its image, with {END} at the end."
        found.append(Finding("lone mask", "warning", names, message))
    whole = tuple(image.path.name for image in images if image.mask is None)
    if kind != "none" and whole:
        what = "no mask" if kind == "file" else "no transparent pixels"
        message = f"{len(whole)} of {len(images)} images have {what} and are trained whole: {some(whole)}."
        found.append(Finding("no mask", "warning", whole, message))
    if kind != "file" and files:
        names = tuple(path.name for path in files.values())
        message = f"{some(names)}: masks are no images and not trained; data.masks = 'file' makes use of them."
        found.append(Finding("unused mask", "warning", names, message))
    return found
