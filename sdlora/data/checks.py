"""Dataset checks: all errors and warnings about a folder of images, file by file.

`load_dataset` raises the errors and passes the warnings on; `sdlora data` and the studio show both.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from sdlora.common.bundled import AS_WRITTEN, IMAGE_SUFFIXES, CaptionOptions
from sdlora.data.batches import Bucket
from sdlora.data.captions import METADATA, lacks_trigger, read_captions
from sdlora.data.duplicates import near_duplicates, thumbnail
from sdlora.data.images import MASK_SUFFIX, MaskKind, load_image, load_mask, pixel_hash, separate_masks
from sdlora.errors import DataError

Kind = Literal[
    "unreadable", "caption", "no caption", "subfolder", "unused caption", "duplicate", "near-duplicate", "no trigger",
    "too small", "cropped", "lone bucket", "mask", "lone mask", "no mask", "unused mask",
    "long caption", "unused exclude", "dead link", "other format",
]  # fmt: skip
Severity = Literal["error", "warning"]

NUM_NAMED = 5
_UNREAD = (".jp2", ".psd", ".tga", ".svg", ".ico", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raw", ".xcf", ".kra")


@dataclass(frozen=True)
class Finding:
    """A problem with some files; an error keeps the folder from being trained.

    Attributes:
        files: The names of all files concerned.
        message: What is wrong and what to do; it names the first five files.
    """

    kind: Kind
    severity: Severity
    files: tuple[str, ...]
    message: str

    def of_set(self, name: str | None) -> Finding:
        """The same finding with the name of the set that it is about, if the set has one."""
        if name is None:
            return self
        return replace(self, files=tuple(f"{name}/{file}" for file in self.files), message=f"{name}: {self.message}")


@dataclass(frozen=True, eq=False)
class Image:
    """A readable image.

    Attributes:
        name: Its path in the folder; its file name unless subfolders are read.
        size: Width and height in pixels.
        pixels: Hash of its pixels.
        thumbnail: (n,), see `sdlora.data.duplicates`.
        caption: Its own caption, or the common one; None if there is neither, or it cannot be read.
        mask: Its mask file, the image itself if its alpha channel is the mask; None if all of it is trained.
    """

    path: Path
    name: str
    size: Bucket
    pixels: str
    thumbnail: NDArray[np.float32]
    caption: str | None = None
    mask: Path | None = None


@dataclass(frozen=True)
class Checkup:
    """All findings about a folder, and its readable images by name.

    Attributes:
        num_files: How many images there are, those included that are not readable.
        captions: Of all of these, by name; empty without one.
    """

    num_files: int
    images: tuple[Image, ...]
    findings: tuple[Finding, ...]
    captions: Mapping[str, str]


Decode = Callable[[Path, str], Image]
"""`decode`, or a function that caches what it returns."""


def decode(path: Path, background: str) -> Image:
    """Decode an image and compute what the checks need, which does not include its caption and mask.

    Raises:
        DataError: It cannot be read.
    """
    image = load_image(path, background)
    return Image(path, path.name, image.size, pixel_hash(image), thumbnail(image))


def examine(
    folder: Path,
    *,
    background: str,
    caption: str | None = None,
    trigger: str | None = None,
    allow_trigger_only: bool = False,
    masks: MaskKind = "none",
    recursive: bool = False,
    exclude: Collection[str] = (),
    options: CaptionOptions = AS_WRITTEN,
    decode: Decode = decode,
) -> Checkup:
    """Check all images and captions of a folder; each image is decoded once.

    Args:
        background: Colour that transparent pixels are blended onto.
        caption: Caption of images that have none of their own.
        trigger: What captions should contain.
        allow_trigger_only: Whether images need no caption if there is a trigger.
        masks: Where masks are looked for.
        recursive: Whether images of subfolders are read; see `image_files`.
        exclude: Paths, relative to the folder, of images that are left out.
        options: How captions become texts, as far as it concerns the trigger.
        decode: Replaces `decode`, for example by one that caches.

    Raises:
        DataError: The folder is missing or contains no images, or all of them are left out.
    """
    everything = image_files(folder, recursive=recursive)
    if not everything:
        raise DataError(_no_images(folder))
    files, mask_files, lone = separate_masks(everything, masks)
    if not files:
        raise DataError(f"The folder {str(folder)!r} contains only masks. Add the images that they belong to.")
    names = {path: path.relative_to(folder).as_posix() for path in files}
    captions = read_captions(folder, names.values())
    unknown = sorted(set(exclude) - set(names.values()))
    names = {path: name for path, name in names.items() if name not in exclude}
    if not names:
        raise DataError(f"All images of the folder {str(folder)!r} are in data.exclude. Leave some of them in.")
    mask_files = {stem: file for stem, file in mask_files.items() if stem in {path.with_suffix("") for path in names}}
    used = {source for name in names.values() for source in captions.by_image[name]}
    others = {source for found in captions.by_image.values() for source in found} - used
    faults = [(source, message) for source, message in captions.faults if source not in others]
    findings = [Finding("caption", "error", (source,), message) for source, message in faults]
    broken = {source for source, _ in faults}
    is_metadata_broken = any(PurePath(name).name == METADATA for name in broken)
    images: list[Image] = []
    uncaptioned: list[str] = []
    for path, name in names.items():
        shown = name.encode("utf-8", errors="backslashreplace").decode("utf-8")
        if shown != name:
            message = f"{shown}: the file name is not valid UTF-8. Rename the file."
            findings.append(Finding("unreadable", "error", (shown,), message))
            continue
        found = captions.by_image[name]
        texts = {source: text for source, text in found.items() if text}
        if len(set(texts.values())) > 1:
            *some, last = sorted(PurePath(source).name for source in texts)
            message = f"{name}: {', '.join(some)} and {last} give different captions; keep one."
            findings.append(Finding("caption", "error", (name,), message))
        text = next(iter(texts.values()), caption)
        # An unreadable caption is not reported as missing as well.
        if (
            text is None
            and not (trigger and allow_trigger_only)
            and not is_metadata_broken
            and not broken & found.keys()
        ):
            uncaptioned.append(name)
        try:
            image = replace(decode(path, background), name=name)
        except DataError as error:
            findings.append(Finding("unreadable", "error", (name,), str(error)))
            continue
        if (file := {"none": None, "alpha": path, "file": mask_files.get(path.with_suffix(""))}[masks]) is not None:
            mask, fault = _mask(image, file)
            findings += about_files("mask", [file.relative_to(folder).as_posix()] if fault else [], fault, "error")
            image = replace(image, mask=mask)
        images.append(replace(image, caption=text))
    findings += about_files(
        "no caption",
        uncaptioned,
        f"{len(uncaptioned)} of {len(names)} images have no caption: {first_names(uncaptioned)}. Write one into "
        "NAME.txt beside each, set data.caption for all, or set data.trigger and data.allow_trigger_only.",
        "error",
    )
    findings += _ignored_files(folder, captions.unused, recursive=recursive)
    findings += _duplicates(images)
    findings += _missing_triggers(images, trigger, options)
    relative = {path: path.relative_to(folder).as_posix() for path in (*mask_files.values(), *lone)}
    findings += _mask_warnings(images, [relative[p] for p in mask_files.values()], [relative[p] for p in lone], masks)
    findings += about_files(
        "unused exclude", unknown, f"data.exclude names images that are not there: {first_names(unknown)}."
    )
    own = {name: next(filter(None, captions.by_image[name].values()), "") for name in names.values()}
    return Checkup(len(names), tuple(images), tuple(findings), own)


def copies_between(sets: Mapping[str, Sequence[Image]]) -> list[Finding]:
    """Duplicates and near-duplicates between sets of images, whose names become part of those of their images."""
    if len(sets) < 2:
        return []
    owners = {f"{name}/{image.name}": name for name, images in sets.items() for image in images}
    renamed = [replace(image, name=f"{name}/{image.name}") for name, images in sets.items() for image in images]
    return [finding for finding in _duplicates(renamed) if len({owners[file] for file in finding.files}) > 1]


def refuse_errors(folder: Path, findings: Iterable[Finding]) -> None:
    """Raise the errors among the findings about a folder, all at once.

    Raises:
        DataError: There is one.
    """
    errors = [f"\n  {finding.message}" for finding in findings if finding.severity == "error"]
    if errors:
        raise DataError(f"The folder {str(folder)!r} has errors:{''.join(errors)}")


def summarize_warnings(findings: Sequence[Finding]) -> list[str]:
    """One sentence per kind of warning, for the notices of a run."""
    groups: dict[Kind, list[Finding]] = {}
    for finding in findings:
        if finding.severity == "warning":
            groups.setdefault(finding.kind, []).append(finding)
    return [found[0].message if len(found) == 1 else _group_summary(found) for found in groups.values()]


def _group_summary(found: Sequence[Finding]) -> str:
    what = "pairs" if all(len(finding.files) == 2 for finding in found) else "groups"
    groups = first_names([first_names(finding.files, " and ") for finding in found])
    return f"{len(found)} {found[0].kind} {what}: {groups}; keep one of each."


def first_names(names: Sequence[str], joint: str = ", ") -> str:
    """The first five names of a list, and how many more there are."""
    more = f" and {len(names) - NUM_NAMED} more" if len(names) > NUM_NAMED else ""
    return joint.join(names[:NUM_NAMED]) + more


def about_files(kind: Kind, names: Collection[str], message: str, severity: Severity = "warning") -> list[Finding]:
    """The finding about some files; none if there are no files."""
    return [Finding(kind, severity, tuple(names), message)] if names else []


def image_files(folder: Path, *, recursive: bool = False) -> list[Path]:
    """The images and masks of a folder, by name; hidden files are none.

    Args:
        recursive: Whether to include those of its subfolders, except hidden ones and `holdout`, which contains
            validation images.

    Raises:
        DataError: The folder does not exist.
    """
    if not folder.is_dir():
        raise DataError(f"There is no folder {str(folder)!r}. Check the path; it is relative to the working directory.")
    # Hidden files are what systems keep of images, such as macOS' ._NAME and Android's .trashed-NAME.
    try:
        everything = list(folder.iterdir())
    except OSError as error:
        raise DataError(f"The folder {str(folder)!r} cannot be read ({error.strerror}). Check its rights.") from error
    shown = (path for path in everything if path.is_file() and not path.name.startswith("."))
    files = sorted(path for path in shown if path.suffix.lower() in IMAGE_SUFFIXES)
    for subfolder in _subfolders(folder) if recursive else ():
        files += image_files(subfolder, recursive=True)
    return files


def _places(folder: Path, *, recursive: bool) -> list[Path]:
    """A folder, and all folders in it whose images are read with it."""
    inside = [place for one in _subfolders(folder) for place in _places(one, recursive=True)] if recursive else []
    return [folder, *inside]


def _subfolders(folder: Path) -> list[Path]:
    above = (folder.resolve(), *folder.resolve().parents)
    found = (path for path in folder.iterdir() if path.is_dir() and path.resolve() not in above)
    return sorted(path for path in found if not path.name.startswith(".") and path.name != "holdout")


def _no_images(folder: Path) -> str:
    """What is wrong with a folder without images: which of its subfolders have some, and how to train on them."""
    counts: Counter[str] = Counter()
    for path in image_files(folder, recursive=True):
        counts[path.parent.relative_to(folder).as_posix()] += 1
    if not counts:
        return f"The folder {str(folder)!r} contains no images ({', '.join(sorted(IMAGE_SUFFIXES))})."
    found = first_names([f"{name} ({number})" for name, number in counts.items()])
    return (
        f"The folder {str(folder)!r} contains no images itself; its subfolders do: {found}. To train on all of them, "
        "set data.recursive = true; for repeats or a trigger of their own, list them in data.sets, or name each "
        "REPEATS_NAME (such as 10_zumi)."
    )


def _ignored_files(folder: Path, unused_captions: list[str], *, recursive: bool) -> list[Finding]:
    subfolders = [] if recursive else [path.name for path in _subfolders(folder)]
    names = first_names(subfolders)
    ignored = f"Subfolders of {folder.name} are ignored: {names}. Set data.recursive = true to train on their images."
    unused = sorted(unused_captions)
    files = [file for place in _places(folder, recursive=recursive) for file in sorted(place.iterdir())]
    dead = [file.name for file in files if file.suffix.lower() in IMAGE_SUFFIXES and not file.exists()]
    strange = [file.name for file in files if file.suffix.lower() in _UNREAD and not file.name.startswith(".")]
    unmatched = f"Captions without an image: {first_names(unused)}. Rename them to match an image, or remove them."
    return [
        *about_files("dead link", dead, f"Links to files that do not exist are left out: {first_names(dead)}."),
        *about_files(
            "other format",
            strange,
            f"Files that sdlora does not read are left out: {first_names(strange)}. Save them as PNG.",
        ),
        *about_files("subfolder", subfolders, ignored),
        *about_files("unused caption", unused, unmatched),
    ]


def _duplicates(images: list[Image]) -> list[Finding]:
    def finding(kind: Kind, what: str, images: list[Image]) -> Finding:
        names = tuple(image.name for image in images)
        return Finding(kind, "warning", names, f"{first_names(names, ' and ')} are {what}; keep one of them.")

    same: dict[str, list[Image]] = {}
    for image in images:
        same.setdefault(image.pixels, []).append(image)
    found = [finding("duplicate", "the same image", group) for group in same.values() if len(group) > 1]
    distinct = [group[0] for group in same.values()]
    groups = near_duplicates(np.stack([image.thumbnail for image in distinct])) if distinct else []
    return found + [finding("near-duplicate", "near-duplicates", [distinct[i] for i in group]) for group in groups]


def _missing_triggers(images: list[Image], trigger: str | None, options: CaptionOptions) -> list[Finding]:
    captions = {image.name: image.caption for image in images if image.caption}
    names = [name for name, caption in captions.items() if trigger and lacks_trigger(caption, options, trigger)]
    message = (
        f"{len(names)} of {len(captions)} captions do not contain the trigger {trigger!r}: {first_names(names)}. "
        "It is put in front of them; to have it elsewhere, add it to the caption."
    )
    return about_files("no trigger", names, message)


def _mask(image: Image, file: Path) -> tuple[Path | None, str]:
    """The mask of an image, None if the whole image is trained, and what is wrong with it, empty if nothing is."""
    try:
        mask = load_mask(file, image.path)
    except DataError as error:
        return None, str(error)
    if mask is None:
        return None, ""
    if mask.size != image.size:
        own, other = (f"{width} x {height}" for width, height in (image.size, mask.size))
        return file, f"{file.name} has {other} pixels, but its image {own}; save it in the size of the image."
    if mask.getextrema() == (0, 0):
        return file, f"The mask of {image.name} hides the whole image; correct it, or remove the image."
    return file, ""


def _mask_warnings(images: list[Image], masks: list[str], lone: list[str], kind: MaskKind) -> list[Finding]:
    whole = [image.name for image in images if image.mask is None and kind != "none"]
    unused = masks if kind != "file" else []
    what = "no mask" if kind == "file" else "no transparent pixels"
    return [
        *about_files(
            "lone mask",
            lone,
            f"Masks without an image: {first_names(lone)}. The mask of NAME.png is called NAME{MASK_SUFFIX}.",
        ),
        *about_files(
            "no mask",
            whole,
            f"{len(whole)} of {len(images)} images have {what} and are trained in full: {first_names(whole)}.",
        ),
        *about_files(
            "unused mask",
            unused,
            f"{first_names(unused)}: masks are ignored; set data.masks = 'file' to use them.",
        ),
    ]
