"""Whether images and captions fit what they are trained with: the sizes of buckets, and the windows of tokens.

Findings like those of `checks`, once the training sizes and the base model are known.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping

from sdlora.data.batches import Bucket
from sdlora.data.checks import Finding, about_files, first_names

LEAST_KEPT = 0.8
"""The share of an image, left by the crop, below which it is reported."""


def examine_sizes(sizes: Mapping[str, Bucket], buckets: Mapping[str, Bucket]) -> list[Finding]:
    """Check whether images, by name, suit the sizes they are trained at.

    Args:
        sizes: Width and height of each image in pixels.
        buckets: Width and height of each image's bucket.
    """
    fitted = {name: f"{w} x {h} for {buckets[name][0]} x {buckets[name][1]}" for name, (w, h) in sizes.items()}
    small = {
        name: f"{name} ({fitted[name]})"
        for name, (width, height) in sizes.items()
        if width < buckets[name][0] or height < buckets[name][1]
    }
    kept = {name: _share_kept(size, buckets[name]) for name, size in sizes.items()}
    cropped = {
        name: f"{name} keeps {share:.0%} ({fitted[name]})"
        for name, share in sorted(kept.items(), key=lambda one: one[1])
        if share < LEAST_KEPT
    }
    widest = max((max(size) / min(size) for name, size in sizes.items() if name in cropped), default=1.0)
    used = Counter(buckets.values())
    alone = {name: f"{name} ({b[0]} x {b[1]})" for name, b in buckets.items() if used[b] == 1 < len(buckets)}
    return [
        *about_files(
            "too small",
            small,
            f"{_count(small)} smaller than the training size and will be enlarged: "
            f"{first_names([*small.values()])}. Use larger originals, or lower data.resolution_px.",
        ),
        *about_files(
            "cropped",
            cropped,
            f"{_count(cropped)} cropped by more than a fifth: {first_names([*cropped.values()])}. Crop to "
            "what matters yourself, or allow longer buckets with data.buckets = true and data.max_aspect = "
            f"{min(math.ceil(10 * widest) / 10, 8.0):g}.",
        ),
        *about_files(
            "lone bucket",
            alone,
            f"{_count(alone)} alone in a bucket, and so in a batch: {first_names([*alone.values()])}. "
            "Crop to the aspect ratio of other images, add images like it, or set data.buckets = false.",
        ),
    ]


def _share_kept(size: Bucket, bucket: Bucket) -> float:
    """The share of an image that is left once it is scaled to cover a bucket and cropped."""
    aspect, trained = size[0] / size[1], bucket[0] / bucket[1]
    return min(aspect, trained) / max(aspect, trained)


def examine_lengths(num_tokens: Mapping[str, int], max_tokens: int, *, in_windows: bool = True) -> list[Finding]:
    """Check whether captions, by the name of their image, are read as a whole.

    Args:
        num_tokens: The length of each caption, start and end tokens included, as in `max_tokens`.
        in_windows: Whether more windows can be read.
    """
    long = [name for name, number in num_tokens.items() if number > max_tokens]
    advice = (
        "To read more windows of 75 tokens, raise data.max_token_windows."
        if in_windows
        else "Shorten them: this base model reads no more."
    )
    what, verb = ("1 caption", "is") if len(long) == 1 else (f"{len(long)} captions", "are")
    message = f"{what} {verb} longer than {max_tokens} tokens and {verb} cut off there: {first_names(long)}. {advice}"
    return about_files("long caption", long, message)


def _count(names: Collection[str]) -> str:
    return "1 image is" if len(names) == 1 else f"{len(names)} images are"
