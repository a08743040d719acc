"""From a folder to examples: every picture decoded once, every fault named at once.

Floor 2.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from sdlora.data.buckets import Bucket, choose_bucket, make_buckets
from sdlora.data.captions import METADATA, read_captions
from sdlora.data.images import SUFFIXES, crop_to_bucket, load_image
from sdlora.errors import DataError


@dataclass(frozen=True)
class Example:
    """One picture with its words.

    Attributes:
        name: File name, unique in its set.
        path: Where it is.
        caption: Its caption as written.
        bucket: Width and height it is trained at, in pixels; its own size until buckets are assigned.
    """

    name: str
    path: Path
    caption: str
    bucket: Bucket


@dataclass(frozen=True)
class Dataset:
    """A folder that can be trained on.

    Attributes:
        folder: Where it is.
        examples: The pictures, by name.
        notices: What the user should know of it, one sentence each.
    """

    folder: Path
    examples: tuple[Example, ...]
    notices: tuple[str, ...]

    def with_buckets(self, resolution_px: int, bucket_step_px: int, *, buckets: bool) -> Dataset:
        """The same pictures, each assigned the bucket nearest to its shape.

        Args:
            resolution_px: Edge of the square that sets the area of buckets.
            bucket_step_px: Step of the buckets' sizes.
            buckets: False crops everything to the square.
        """
        sizes = make_buckets(resolution_px, bucket_step_px) if buckets else [(resolution_px, resolution_px)]
        assigned = tuple(replace(e, bucket=choose_bucket(*e.bucket, sizes)) for e in self.examples)
        return replace(self, examples=assigned)


def load_dataset(
    folder: Path,
    *,
    caption: str | None,
    trigger: str | None,
    allow_trigger_only: bool,
    background: str,
) -> Dataset:
    """Read a folder of pictures with `.txt` sidecars or a `metadata.jsonl`.

    Args:
        folder: Read flat; subfolders are left out with a notice.
        caption: For pictures that have no caption of their own.
        trigger: The trigger word, for `allow_trigger_only`.
        allow_trigger_only: Whether pictures may go with an empty caption, to which the trigger is added.
        background: Colour under transparent pixels.

    Raises:
        DataError: The folder is missing or empty, or pictures are broken or lack a caption; each file is named.
    """
    if not folder.is_dir():
        raise DataError(f"There is no folder {str(folder)!r}. Set data.folder to the folder of your pictures.")
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.suffix.lower() in SUFFIXES)
    if not files:
        kinds = ", ".join(sorted(SUFFIXES))
        raise DataError(f"The folder {str(folder)!r} holds no pictures ({kinds}).")
    captions = read_captions(folder)
    examples: list[Example] = []
    faults: list[str] = []
    uncaptioned: list[str] = []
    for path in files:
        try:
            text = _caption(path, captions)
            picture = load_image(path, background)
        except DataError as error:
            faults.append(str(error) if str(error).startswith(path.name) else f"{path.name}: {error}")
            continue
        if text is None:
            text = caption
        if text is None and not (trigger and allow_trigger_only):
            uncaptioned.append(path.name)
            continue
        examples.append(Example(path.name, path, text or "", picture.size))
    if uncaptioned:
        faults.append(
            f"{len(uncaptioned)} of {len(files)} pictures have no caption: {_some(uncaptioned)}. Write one into "
            "NAME.txt beside each, or set data.caption for all, or data.trigger with data.allow_trigger_only."
        )
    if faults:
        raise DataError(f"The folder {str(folder)!r} has faults:\n" + "\n".join(f"  {fault}" for fault in faults))
    return Dataset(folder, tuple(examples), tuple(_notices(folder, files, captions)))


def _caption(path: Path, captions: dict[str, str]) -> str | None:
    sidecar, listed = captions.get(f"{path.stem}.txt"), captions.get(path.name)
    if sidecar is not None and listed is not None and sidecar != listed:
        raise DataError(f"{path.name}: {path.stem}.txt and {METADATA} give two different captions; remove one.")
    return sidecar if sidecar is not None else listed


def _notices(folder: Path, files: list[Path], captions: dict[str, str]) -> list[str]:
    notices: list[str] = []
    found = (path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    # A subfolder of that name is where `data.holdout` keeps its pictures, beside those it must not be trained with.
    subfolders = sorted(name for name in found if name != "holdout")
    if subfolders:
        notices.append(f"Subfolders of {folder.name} are not read: {_some(subfolders)}.")
    used = {path.name for path in files} | {f"{path.stem}.txt" for path in files}
    unused = sorted(set(captions) - used)
    if unused:
        notices.append(f"Captions without a picture: {_some(unused)}.")
    return notices


def _some(names: list[str], count: int = 5) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


def load_pixels(example: Example, background: str) -> Image.Image:
    """An example's picture, cropped to its bucket."""
    return crop_to_bucket(load_image(example.path, background), *example.bucket)
