"""Parts of training images in previews, such as a subject that was cut out and placed elsewhere.

A sign of the copy check where `copycheck.parts` is on; it needs OpenCV and decides nothing. Local features of a preview
are matched with those of every training image. Matches that agree in one rotation, scale and shift are counted, and
compared with how many the set's own images share at most.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps

from sdlora.copycheck.signals import Signal

MIN_PX = 256
"""The short edge from which images have enough local features."""
# Chosen on the photographs of docs/measurements/copy-check.md, which has the rates.
TIMES, MARGIN = 1.7, 20
SAME_POINTS = 100
"""The matching points from which two images of a set count as one picture, such as two shots of one moment."""
_NUM_FEATURES, _CORNER = 1500, 7
_RATIO = 0.8  # a match counts if the second best is this much worse
_REACH_PX = 6.0
_SCALES = (0.4, 2.5)
_FEWEST = 4
_MAX_COMPARED = 12  # images of the set that are compared with each other

Outline = list[list[float]]
"""Corners, x and y each, in shares of an image's width and height."""


@dataclass(frozen=True)
class Part:
    """A part of a training image that a preview seems to show.

    Attributes:
        name: The training image's.
        points: How many matching points agree.
        preview: Their outline on the preview.
        training: The same on the training image.
    """

    name: str
    points: int
    preview: Outline
    training: Outline


class _Features(NamedTuple):
    places: Any  # (n, 2) in pixels
    descriptors: Any  # (n, 32) bytes, or None without any
    size: tuple[int, int]


class _Agreement(NamedTuple):
    points: int
    first: Outline
    second: Outline


_NONE = _Agreement(0, [], [])


def why_unavailable(images: Sequence[Image.Image]) -> str | None:
    """Why parts of these images cannot be looked for, and what to do; None if they can."""
    if find_spec("cv2") is None:
        return "copycheck.parts needs OpenCV. Install it: pip install 'sdlora[opencv]'"
    if min(min(image.size) for image in images) < MIN_PX:
        return f"copycheck.parts has no effect: an image is smaller than {MIN_PX} px, too small for local features."
    return None


class PartFinder:
    """Finds parts of a set's images.

    Args:
        gallery: The images by name, at least one, each of at least 256 px.

    Source: Rublee et al. 2011, "ORB: an efficient alternative to SIFT or SURF"; Fischler & Bolles 1981, "Random sample
    consensus".
    """

    def __init__(self, gallery: Mapping[str, Image.Image]) -> None:
        self._cv2: Any = importlib.import_module("cv2")
        self._known = {name: self._features(image) for name, image in gallery.items()}
        names = list(gallery)[:: -(-len(gallery) // _MAX_COMPARED)]
        shared = [self._best(self._both(gallery[a]), self._known[b]).points for a, b in combinations(names, 2)]
        self.usual = max((points for points in shared if points < SAME_POINTS), default=0)
        """How many matching points two different images of the set share at most."""

    def find(self, preview: Image.Image) -> Part | None:
        """The part of a training image that a preview shows most clearly, or None if it shows none."""
        both = self._both(preview)
        found = {name: self._best(both, features) for name, features in self._known.items()}
        name = max(found, key=lambda one: found[one].points)
        points, first, second = found[name]
        if points + MARGIN <= TIMES * (self.usual + MARGIN):
            return None
        return Part(name, points, first, second)

    def _features(self, image: Image.Image) -> _Features:
        detector = self._cv2.ORB_create(_NUM_FEATURES, fastThreshold=_CORNER)
        places, descriptors = detector.detectAndCompute(np.asarray(image.convert("L")), None)
        return _Features(self._cv2.KeyPoint_convert(places), descriptors, image.size)

    def _both(self, image: Image.Image) -> tuple[_Features, _Features]:
        return self._features(image), self._features(ImageOps.mirror(image))

    def _best(self, both: tuple[_Features, _Features], known: _Features) -> _Agreement:
        """The agreement of an image, or of its mirror image, with another."""
        plain, mirrored = (self._agreement(features, known) for features in both)
        if plain.points >= mirrored.points:
            return plain
        return mirrored._replace(first=[[round(1 - x, 3), y] for x, y in mirrored.first])

    def _agreement(self, first: _Features, second: _Features) -> _Agreement:
        """Matching points that agree in one rotation, scale and shift; neighbours count once."""
        if min(len(first.places), len(second.places)) < _FEWEST:
            return _NONE
        pairs = self._cv2.BFMatcher(self._cv2.NORM_HAMMING).knnMatch(first.descriptors, second.descriptors, k=2)
        good = [best for best, other in pairs if best.distance < _RATIO * other.distance]
        if len(good) < _FEWEST:
            return _NONE
        places = (
            first.places[[match.queryIdx for match in good]],
            second.places[[match.trainIdx for match in good]],
        )
        motion, inside = self._cv2.estimateAffinePartial2D(*places, ransacReprojThreshold=_REACH_PX)
        if motion is None or not _SCALES[0] < np.hypot(motion[0, 0], motion[1, 0]) < _SCALES[1]:
            return _NONE
        agreeing = [found[inside[:, 0] > 0] for found in places]
        points = min(len({(x // _REACH_PX, y // _REACH_PX) for x, y in found.tolist()}) for found in agreeing)
        outlines = [self._outline(found, of.size) for found, of in zip(agreeing, (first, second), strict=True)]
        return _Agreement(points, *outlines)

    def _outline(self, places: Any, size: tuple[int, int]) -> Outline:
        hull = self._cv2.convexHull(places)[:, 0] / np.asarray(size)
        return [[round(float(x), 3), round(float(y), 3)] for x, y in hull]


def parts_signal(parts: Sequence[Part | None]) -> Signal:
    """In how many previews a part of a training image was found; it has no p-value, because it decides nothing."""
    found = [part for part in parts if part is not None]
    told = f"{len(found)} of {len(parts)} previews show a part of a training image, by local features"
    if found:
        best = max(found, key=lambda part: part.points)
        told += f"; the clearest is of {best.name} ({best.points} matching points)"
    return Signal("parts", len(found) / len(parts), None, f"{told}.")
