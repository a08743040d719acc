"""Dataset checks: all errors and warnings about a folder of images, file by file.

`load_dataset` raises the errors and passes the warnings on; `sdlora data` and the studio show both.
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
from sdlora.data.masks import MASK_SUFFIX, MaskKind, load_mask, separate_masks
from sdlora.errors import DataError

Kind = Literal[
    "unreadable", "caption", "no caption", "subfolder", "unused caption", "duplicate", "near-duplicate", "no trigger",
    "too small", "lone bucket", "mask", "lone mask", "no mask", "unused mask",
]  # fmt: skip


NUM_NAMED = 5


@dataclass(frozen=True)
class Finding:
    """A problem with some files.

    Attributes:
        kind: Which problem it is.
        severity: "error" if it keeps the folder from being trained.
        files: The names of all files concerned.
        message: What is wrong and what to do; it names the first five files.
    """

    kind: Kind
    severity: Literal["error", "warning"]
    files: tuple[str, ...]
    message: str


@dataclass(frozen=True, eq=False)
class Image:
    """A readable image.

    Attributes:
        path: The file.
        caption: Its own caption, or the common one; None if there is neither, or it cannot be read.
        size: Width and height in pixels.
        pixels: Hash of its pixels.
        thumbnail: (n,), see `sdlora.data.duplicates`.
        mask: Its mask file, the image itself if its alpha channel is the mask; None if all of it is trained.
    """

    path: Path
    caption: str | None
    size: Bucket
    pixels: str
    thumbnail: NDArray[np.float32]
    mask: Path | None = None


@dataclass(frozen=True, eq=False)
class Decoded:
    """What is known of an image once it is decoded; see `Image`."""

    size: Bucket
    pixels: str
    thumbnail: NDArray[np.float32]


@dataclass(frozen=True)
class Checkup:
    """The result of checking a folder.

    Attributes:
        num_files: Number of images, including those that cannot be read.
        images: The readable images, by name.
        findings: All problems.
    """

    num_files: int
    images: tuple[Image, ...]
    findings: tuple[Finding, ...]


def decode(path: Path, background: str) -> Decoded:
    """Decode an image and compute what the checks need.

    Raises:
        DataError: It cannot be read.
    """
    image = load_image(path, background)
    return Decoded(image.size, pixel_hash(image), thumbnail(image))


def examine(
    folder: Path,
    *,
    background: str,
    caption: str | None = None,
    trigger: str | None = None,
    allow_trigger_only: bool = False,
    masks: MaskKind = "none",
    decode: Callable[[Path, str], Decoded] = decode,
) -> Checkup:
    """Check all images and captions of a folder; each image is decoded once.

    Args:
        folder: Only its own files are read, not subfolders.
        background: Colour that transparent pixels are blended onto.
        caption: Caption of images that have none of their own.
        trigger: The trigger word, which captions should contain.
        allow_trigger_only: Whether images need no caption if there is a trigger.
        masks: Where masks are looked for.
        decode: Replaces `decode`, for example by one that caches.

    Raises:
        DataError: The folder is missing or contains no images.
    """
    files, mask_files, lone = separate_masks(_image_files(folder), masks)
    if not files:
        raise DataError(f"The folder {str(folder)!r} contains only masks. Add the images that they belong to.")
    captions, faults = read_captions(folder)
    findings = [Finding("caption", "error", (name,), message) for name, message in faults]
    broken = {name for name, _ in faults}
    images: list[Image] = []
    uncaptioned: list[str] = []
    for path in files:
        shown = path.name.encode("utf-8", errors="backslashreplace").decode("utf-8")
        if shown != path.name:
            message = f"{shown}: the file name is not valid UTF-8. Rename the file."
            findings.append(Finding("unreadable", "error", (shown,), message))
            continue
        own, conflict = _own_caption(path, captions)
        findings += conflict
        text = caption if own is None else own
        # An unreadable caption is not reported as missing as well.
        if text is None and not (trigger and allow_trigger_only) and not broken & {METADATA, f"{path.stem}.txt"}:
            uncaptioned.append(path.name)
        try:
            decoded = decode(path, background)
        except DataError as error:
            findings.append(Finding("unreadable", "error", (path.name,), str(error)))
            continue
        mask, faulty = _mask(path, decoded.size, mask_files, masks)
        findings += faulty
        images.append(Image(path, text, decoded.size, decoded.pixels, decoded.thumbnail, mask))
    findings += _missing_captions(uncaptioned, len(files))
    findings += _ignored_files(folder, files, captions)
    findings += _duplicates(images)
    findings += _missing_triggers(images, trigger)
    findings += _mask_warnings(images, mask_files, lone, masks)
    return Checkup(len(files), tuple(images), tuple(findings))


def examine_sizes(sizes: Mapping[str, Bucket], buckets: Mapping[str, Bucket]) -> list[Finding]:
    """Check whether images suit the sizes they are trained at.

    Args:
        sizes: Width and height of each image in pixels, by name.
        buckets: Width and height of each image's bucket, by name.
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
            f"{_count(small)} smaller than the training size and will be enlarged: "
            f"{first_names(list(small.values()))}. Use larger originals, or lower data.resolution_px."
        )
        found.append(Finding("too small", "warning", tuple(small), message))
    if alone:
        message = (
            f"{_count(alone)} alone in a bucket, and so in a batch: {first_names(list(alone.values()))}. "
            "Crop to the aspect ratio of other images, add images like it, or set data.buckets = false."
        )
        found.append(Finding("lone bucket", "warning", tuple(alone), message))
    return found


def copies_between(sets: Mapping[str, Sequence[Image]]) -> list[Finding]:
    """Duplicates and near-duplicates between sets.

    Args:
        sets: Images by the name of their set, which becomes part of their names.
    """
    if len(sets) < 2:
        return []
    renamed = {
        name: [replace(image, path=Path(name, image.path.name)) for image in images] for name, images in sets.items()
    }
    found = _duplicates([image for images in renamed.values() for image in images], whole_path=True)
    return [finding for finding in found if len({Path(file).parent for file in finding.files}) > 1]


def summarize_warnings(findings: Sequence[Finding]) -> list[str]:
    """One sentence per kind of warning, for the notices of a run."""
    groups: dict[Kind, list[Finding]] = {}
    for finding in findings:
        if finding.severity == "warning":
            groups.setdefault(finding.kind, []).append(finding)
    return [found[0].message if len(found) == 1 else _group_summary(found) for found in groups.values()]


def first_names(names: Sequence[str], joint: str = ", ") -> str:
    """The first five names of a list, and how many more there are."""
    more = f" and {len(names) - NUM_NAMED} more" if len(names) > NUM_NAMED else ""
    return joint.join(names[:NUM_NAMED]) + more


def _count(names: Mapping[str, str]) -> str:
    return "1 image is" if len(names) == 1 else f"{len(names)} images are"


def _image_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise DataError(f"There is no folder {str(folder)!r}. Check the path; it is relative to the working directory.")
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.suffix.lower() in SUFFIXES)
    if not files:
        kinds = ", ".join(sorted(SUFFIXES))
        raise DataError(f"The folder {str(folder)!r} contains no images ({kinds}).")
    return files


def _own_caption(path: Path, captions: Mapping[str, str]) -> tuple[str | None, list[Finding]]:
    sidecar, listed = captions.get(f"{path.stem}.txt"), captions.get(path.name)
    if sidecar is None or listed is None or sidecar == listed:
        return sidecar or listed, []
    message = f"{path.name}: {path.stem}.txt and {METADATA} give two different captions; remove one."
    return sidecar, [Finding("caption", "error", (path.name,), message)]


def _missing_captions(names: list[str], num_files: int) -> list[Finding]:
    if not names:
        return []
    message = (
        f"{len(names)} of {num_files} images have no caption: {first_names(names)}. Write one into "
        "NAME.txt beside each, set data.caption for all, or set data.trigger and data.allow_trigger_only."
    )
    return [Finding("no caption", "error", tuple(names), message)]


def _ignored_files(folder: Path, files: list[Path], captions: Mapping[str, str]) -> list[Finding]:
    found: list[Finding] = []
    folders = (path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    # A subfolder `holdout` contains validation images, which must not be trained on.
    subfolders = sorted(name for name in folders if name != "holdout")
    if subfolders:
        names = first_names(subfolders)
        message = f"Subfolders of {folder.name} are ignored: {names}. Move their images up to train on them."
        found.append(Finding("subfolder", "warning", tuple(subfolders), message))
    used = {path.name for path in files} | {f"{path.stem}.txt" for path in files}
    unused = sorted(set(captions) - used)
    if unused:
        message = f"Captions without an image: {first_names(unused)}. Rename them to match an image, or remove them."
        found.append(Finding("unused caption", "warning", tuple(unused), message))
    return found


def _duplicates(images: list[Image], *, whole_path: bool = False) -> list[Finding]:
    same: dict[str, list[Image]] = {}
    for image in images:
        same.setdefault(image.pixels, []).append(image)
    groups = [group for group in same.values() if len(group) > 1]
    found = [_duplicate_finding("duplicate", "the same image", group, whole_path=whole_path) for group in groups]
    distinct = [group[0] for group in same.values()]
    if distinct:
        for indices in near_duplicates(np.stack([image.thumbnail for image in distinct])):
            similar = [distinct[index] for index in indices]
            found.append(_duplicate_finding("near-duplicate", "near-duplicates", similar, whole_path=whole_path))
    return found


def _duplicate_finding(kind: Kind, what: str, images: list[Image], *, whole_path: bool) -> Finding:
    names = tuple(image.path.as_posix() if whole_path else image.path.name for image in images)
    return Finding(kind, "warning", names, f"{first_names(names, ' and ')} are {what}; keep one of them.")


def _group_summary(found: Sequence[Finding]) -> str:
    what = "pairs" if all(len(finding.files) == 2 for finding in found) else "groups"
    groups = first_names([first_names(finding.files, " and ") for finding in found])
    return f"{len(found)} {found[0].kind} {what}: {groups}; keep one of each."


def _missing_triggers(images: list[Image], trigger: str | None) -> list[Finding]:
    captioned = [image for image in images if image.caption]
    names = [p.path.name for p in captioned if trigger and p.caption and not has_word(p.caption, trigger)]
    if not names:
        return []
    message = (
        f"{len(names)} of {len(captioned)} captions do not contain the trigger {trigger!r}: {first_names(names)}. "
        "It is put in front of them; to have it elsewhere, add it to the caption."
    )
    return [Finding("no trigger", "warning", tuple(names), message)]


def _mask(path: Path, size: Bucket, files: Mapping[str, Path], kind: MaskKind) -> tuple[Path | None, list[Finding]]:
    """The mask of an image, and the problem with it."""
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
        fault = f"{mask.name} has {other} pixels, but its image {own}; save it in the size of the image."
    elif image.getextrema() == (0, 0):
        fault = f"The mask of {path.name} hides the whole image; correct it, or remove the image."
    return mask, [] if fault is None else [Finding("mask", "error", (mask.name,), fault)]


def _mask_warnings(images: list[Image], files: Mapping[str, Path], lone: list[Path], kind: MaskKind) -> list[Finding]:
    found: list[Finding] = []
    if lone:
        names = tuple(path.name for path in lone)
        message = f"Masks without an image: {first_names(names)}. The mask of NAME.png is called NAME{MASK_SUFFIX}."
        found.append(Finding("lone mask", "warning", names, message))
    whole = tuple(image.path.name for image in images if image.mask is None)
    if kind != "none" and whole:
        what = "no mask" if kind == "file" else "no transparent pixels"
        message = f"{len(whole)} of {len(images)} images have {what} and are trained in full: {first_names(whole)}."
        found.append(Finding("no mask", "warning", whole, message))
    if kind != "file" and files:
        names = tuple(path.name for path in files.values())
        message = f"{first_names(names)}: masks are ignored; set data.masks = 'file' to use them."
        found.append(Finding("unused mask", "warning", names, message))
    return found
