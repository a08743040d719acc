"""Datasets: from folders to examples, every image decoded once, all errors reported at once.

A run loads its training, validation and prior images here, or splits a few off for validation; the cache and the
trainer read them by index.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

from PIL import Image, ImageOps

from sdlora.common import seeds
from sdlora.common.bundled import AS_WRITTEN, BucketOptions, CaptionOptions, ImageFolder, resolve_data_folder
from sdlora.data.batches import Bucket, assign_buckets
from sdlora.data.captions import fixed_captions
from sdlora.data.checks import Checkup, Decode, copies_between, decode, examine, refuse_errors, summarize_warnings
from sdlora.data.images import MaskKind, crop_to_bucket, load_image, load_mask
from sdlora.errors import DataError

MIN_IMAGES_TO_SPLIT = 20
MAX_VALIDATION_IMAGES = 4


@dataclass(frozen=True)
class Example:
    """One image with its caption.

    Attributes:
        name: Path in its folder, after the set's name and a slash if the set has a name; unique.
        caption: As written.
        bucket: Width and height that it is trained at, in pixels, the largest of several; its own size until buckets
            are assigned.
        size_px: Width and height of the file, upright.
        mask: The mask file; the image itself if its alpha channel is the mask, None to train all of it.
        repeats: Exposures per epoch.
        captions: How its caption varies.
        flip: Whether every second exposure shows the mirror image.
        is_mirrored: Whether it is the mirror image.
        turns: The buckets that its exposures have in turn; none if it has only one.
        sizes: Which sizes it is trained at, where its folder says so.
        loss_weight: Factor of its loss, above 0.
    """

    name: str
    path: Path
    caption: str
    bucket: Bucket
    size_px: Bucket
    mask: Path | None = None
    trigger: str | None = None
    repeats: int = 1
    captions: CaptionOptions = AS_WRITTEN
    flip: bool = False
    is_mirrored: bool = False
    turns: tuple[Bucket, ...] = ()
    sizes: BucketOptions | None = None
    loss_weight: float = 1.0

    @property
    def buckets(self) -> tuple[Bucket, ...]:
        """The buckets that its exposures have in turn, one or more."""
        return self.turns or (self.bucket,)

    def at_exposure(self, number: int) -> Example:
        """The example as it is seen at an exposure, numbered from 1, in one size.

        Its buckets take turns; if it is flipped, it is mirrored at every second turn of all of them.
        """
        if not self.turns and not self.flip:
            return self
        turn, place = divmod(number - 1, len(self.buckets))
        is_mirrored = self.flip and turn % 2 == 1
        return replace(self, bucket=self.buckets[place], turns=(), flip=False, is_mirrored=is_mirrored)

    def first_like(self, number: int) -> int:
        """The first exposure at which it is seen as it is at a later one."""
        return (number - 1) % (2 * len(self.buckets)) + 1

    def as_evaluated(self) -> Example:
        """The example as it is seen where nothing is trained: in its largest size, and never mirrored."""
        return replace(self, turns=(), flip=False)

    @property
    def prompt(self) -> str:
        """The caption in the one form that is evaluated; see `fixed_captions`."""
        return self.texts[0]

    @property
    def texts(self) -> list[str]:
        """The texts of the caption as written, one for each of its lines if lines are captions."""
        return fixed_captions(self.caption, self.captions, self.trigger)


@dataclass(frozen=True)
class Dataset:
    """Images that can be trained on.

    Attributes:
        examples: The images, by name.
        notices: What the user should know about the images, one sentence each.
    """

    examples: tuple[Example, ...]
    notices: tuple[str, ...]

    def with_buckets(self, resolution_px: int, options: BucketOptions) -> Dataset:
        """The same images, each with the bucket nearest to its aspect ratio at every resolution; see `assign_buckets`.

        Args:
            resolution_px: Where options name none.
            options: Where an image's folder has none of its own.
        """
        assigned = list(self.examples)
        alike: dict[BucketOptions, list[int]] = {}
        for index, example in enumerate(self.examples):
            alike.setdefault(example.sizes or options, []).append(index)
        for own, indices in alike.items():
            sizes = [self.examples[index].bucket for index in indices]
            columns = [assign_buckets(sizes, edge, own) for edge in own.resolutions_px or (resolution_px,)]
            starts: Counter[tuple[Bucket, ...]] = Counter()
            for index, *buckets in zip(indices, *columns, strict=True):
                found = tuple(dict.fromkeys(buckets))
                # Images of one shape begin with different sizes, so that every epoch has all of them.
                start = starts[found] % len(found)
                starts[found] += 1
                turns = (*found[start:], *found[:start]) if len(found) > 1 else ()
                assigned[index] = replace(self.examples[index], bucket=max(found, key=prod), turns=turns)
        return replace(self, examples=tuple(assigned))

    def without_masks(self) -> Dataset:
        """The same images without masks."""
        return replace(self, examples=tuple(replace(example, mask=None) for example in self.examples))


def load_dataset(
    *folders: ImageFolder,
    allow_trigger_only: bool = False,
    background: str = "white",
    masks: MaskKind = "none",
    decode: Decode = decode,
) -> Dataset:
    """Read folders of images, with captions in sidecars or a `metadata.jsonl`, as one dataset.

    Args:
        folders: At least one; where there are several, each has a name of its own.
        allow_trigger_only: Whether images may have an empty caption, to which the trigger is added.
        background: Colour that transparent pixels are blended onto.
        masks: Where masks are looked for.
        decode: Replaces `decode`, for example by one that caches.

    Raises:
        DataError: A folder is missing or empty, or images are broken or have no caption; every file is named.
    """
    checkups: dict[str, Checkup] = {}
    errors: list[str] = []
    examples: list[Example] = []
    notices: list[str] = []
    for source in folders:
        folder, name = resolve_data_folder(source.folder), source.name or ""
        try:
            checkup = examine(
                folder, background=background, caption=source.caption, trigger=source.trigger,
                allow_trigger_only=allow_trigger_only, masks=masks, recursive=source.recursive,
                exclude=source.exclude, options=source.captions, decode=decode,
            )  # fmt: skip
            refuse_errors(folder, checkup.findings)
        except DataError as error:
            errors.append(str(error))
            continue
        checkups[name] = checkup
        common = (source.trigger, source.repeats, source.captions, source.flip)
        examples += [
            Example(
                source.prefix + p.name,
                p.path,
                p.caption or "",
                p.size,
                p.size,
                p.mask,
                *common,
                sizes=source.sizes,
                loss_weight=source.loss_weight,
            )
            for p in checkup.images
        ]
        notices += [f"{name}: {warning}" if name else warning for warning in summarize_warnings(checkup.findings)]
    if errors:
        raise DataError("\n".join(errors))
    shared = copies_between({name: checkup.images for name, checkup in checkups.items()})
    return Dataset(tuple(examples), (*notices, *summarize_warnings(shared)))


def split_validation(dataset: Dataset, seed: int) -> tuple[Dataset, Dataset | None]:
    """Split a dataset into training and validation images: 2 of 20 images, 3 of 30, 4 of 40 or more; None of fewer.

    Each image's place in the draw depends only on the run's seed and its own name, so adding an image replaces at most
    one of the validation images, as long as their number stays the same.
    """
    names = [example.name for example in dataset.examples]
    if len(names) < MIN_IMAGES_TO_SPLIT:
        return dataset, None
    count = min(MAX_VALIDATION_IMAGES, len(names) // 10)
    chosen = set(sorted(names, key=lambda name: seeds.derive(seed, "heldout split", name))[:count])
    trained = tuple(example for example in dataset.examples if example.name not in chosen)
    validation = tuple(example for example in dataset.examples if example.name in chosen)
    return replace(dataset, examples=trained), replace(dataset, examples=validation, notices=())


def load_pixels(example: Example, background: str) -> Image.Image:
    """The image of an example, cropped to its bucket and mirrored if the example is."""
    image = crop_to_bucket(load_image(example.path, background), *example.bucket)
    return ImageOps.mirror(image) if example.is_mirrored else image


def load_mask_pixels(example: Example) -> Image.Image | None:
    """The mask of an example, cropped and mirrored like its image; None if all of it is trained.

    Raises:
        DataError: Nothing unmasked is left after the crop.
    """
    mask = None if example.mask is None else load_mask(example.mask, example.path)
    if mask is None:
        return None
    cropped = crop_to_bucket(mask, *example.bucket)
    if cropped.getextrema() == (0, 0):
        width, height = example.bucket
        raise DataError(
            f"The crop to {width} x {height} pixels cuts off everything that the mask of {example.name} lets through. "
            "Crop the image yourself, or remove it."
        )
    return ImageOps.mirror(cropped) if example.is_mirrored else cropped


class Pixels(Mapping[str, Image.Image]):
    """The images of a dataset by name, cropped to their buckets; each is read on access."""

    def __init__(self, dataset: Dataset, background: str) -> None:
        self._examples = {example.name: example for example in dataset.examples}
        self._background = background

    def __getitem__(self, name: str) -> Image.Image:
        return load_pixels(self._examples[name], self._background)

    def __iter__(self) -> Iterator[str]:
        return iter(self._examples)

    def __len__(self) -> int:
        return len(self._examples)
