"""Which training images an epoch's copies are of, and what to do about them.

Called by `checker` for the previews that are significant; the report, the studio and the model card show it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

MOST_COMPARED = 3
_FEWEST_TOLD = 3  # matches, from which their spread over the images says something


@dataclass(frozen=True)
class CopiedImage:
    """A training image that previews match.

    Attributes:
        name: Of the image.
        matches: How many previews match it, or a twin of it.
        novel: How many of these were drawn from new prompts; the others, from training captions.
        exposures: How often the image was trained on by the end of the epoch, without its twins; None where that is
            unknown.
        twins: Other images of the set that show the same picture, such as a crop of it.
    """

    name: str
    matches: int
    novel: int
    exposures: int | None = None
    twins: list[str] = field(default_factory=list)


def copied_images(
    nearest: Sequence[tuple[str, bool]], find_twins: Callable[[str], Sequence[str]], exposures: Mapping[str, int]
) -> list[CopiedImage]:
    """The images that previews match, the one with the most matches first; twins count as one image.

    Args:
        nearest: Of every preview that matches, the training image, and whether the prompt was a new one.
        find_twins: The other images that show the same picture as one. It is asked about three images at most, because
            that takes time in a large set.
        exposures: By name; empty where they are unknown.
    """
    counts = Counter(name for name, _ in nearest)
    owner: dict[str, str] = {}
    twins: dict[str, list[str]] = {}
    for name, _ in counts.most_common():
        if name not in owner:
            twins[name] = sorted(find_twins(name)) if len(twins) < MOST_COMPARED else []
            owner |= dict.fromkeys([name, *(one for one in twins[name] if one not in owner)], name)
    matches = Counter(owner[name] for name, _ in nearest)
    novel = Counter(owner[name] for name, is_new in nearest if is_new)
    return [
        CopiedImage(name, count, novel[name], exposures.get(name), twins[name]) for name, count in matches.most_common()
    ]


def advice(images: Sequence[CopiedImage], usual_exposures: int | None) -> str:
    """What to do about the images that draw the matches, a sentence or two; empty if there are too few to say.

    Args:
        images: From `copied_images`.
        usual_exposures: The median over the whole set; None if unknown.
    """
    total = sum(image.matches for image in images)
    doubled = next((image for image in images if image.twins and image.matches > 1), None)
    if doubled is not None:
        return (
            f"{doubled.name} draws {doubled.matches} of {total} matches: its picture is in the set "
            f"{len(doubled.twins) + 1} times, also as {', '.join(doubled.twins)}. Keep one of them."
        )
    if total < _FEWEST_TOLD:
        return ""
    first = images[0]
    told = f"{first.name} draws {first.matches} of {total} matches"
    if 2 * first.matches <= total:
        return (
            f"The {total} matches are spread over {len(images)} images, so no single one is to blame: train with fewer "
            "repeats or epochs, or with more images."
        )
    if first.exposures is not None and usual_exposures is not None and first.exposures > usual_exposures:
        return (
            f"{told}: it was trained on {first.exposures} times, most images {usual_exposures} times. Lower the "
            "repeats of its folder."
        )
    return f"{told}. Take it out, or give it a folder of its own with fewer repeats."
