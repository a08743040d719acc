"""From a folder to examples: every picture decoded once, every fault named at once.

Floor 2.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from sdlora.data.buckets import Bucket, assign_buckets
from sdlora.data.doctor import examine, warnings_in_short
from sdlora.data.images import crop_to_bucket, load_image
from sdlora.errors import DataError


@dataclass(frozen=True)
class Example:
    """One picture with its words.

    Attributes:
        name: File name, unique in its set.
        path: Where it is.
        caption: Its caption as written.
        bucket: Width and height it is trained at, in pixels; its own size until buckets are assigned.
        size_px: Its own width and height, upright.
    """

    name: str
    path: Path
    caption: str
    bucket: Bucket
    size_px: Bucket


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
        sizes = [example.bucket for example in self.examples]
        found = assign_buckets(sizes, resolution_px, bucket_step_px, buckets=buckets)
        assigned = tuple(replace(e, bucket=bucket) for e, bucket in zip(self.examples, found, strict=True))
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
    checkup = examine(
        folder, background=background, caption=caption, trigger=trigger, allow_trigger_only=allow_trigger_only
    )
    faults = [finding.message for finding in checkup.findings if finding.severity == "error"]
    if faults:
        raise DataError(f"The folder {str(folder)!r} has faults:\n" + "\n".join(f"  {fault}" for fault in faults))
    examples = (Example(p.path.name, p.path, p.caption or "", p.size, p.size) for p in checkup.pictures)
    return Dataset(folder, tuple(examples), tuple(warnings_in_short(checkup.findings)))


def load_pixels(example: Example, background: str) -> Image.Image:
    """An example's picture, cropped to its bucket."""
    return crop_to_bucket(load_image(example.path, background), *example.bucket)


class Pixels(Mapping[str, Image.Image]):
    """A dataset's pictures by name, cropped to their buckets; each is read when it is asked for.

    Args:
        dataset: Its buckets assigned.
        background: Colour under transparent pixels.
    """

    def __init__(self, dataset: Dataset, background: str) -> None:
        self._examples = {example.name: example for example in dataset.examples}
        self._background = background

    def __getitem__(self, name: str) -> Image.Image:
        return load_pixels(self._examples[name], self._background)

    def __iter__(self) -> Iterator[str]:
        return iter(self._examples)

    def __len__(self) -> int:
        return len(self._examples)
