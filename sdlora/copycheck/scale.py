"""The scale of similarity of a set: how similar fresh images of its subject are, and how similar a copy would be.

Nothing is drawn for it. Fresh images are as similar as the set's images, validation images included, are to each other;
a copy that the base model draws is as similar as an image of the set that went through its VAE. Both are computed once
per run and cached. Called by `checker`, where the VAE softens images with those of `decoded`.
Shapes: P images, K images compared, G images of the gallery, S scores, M measures.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sdlora.cache.tensors import content_key
from sdlora.copycheck.embedders import Embedders
from sdlora.copycheck.similarity import registered_correlation
from sdlora.copycheck.statistics import fisher_z
from sdlora.data.dataset import Dataset, load_pixels
from sdlora.data.duplicates import near_duplicates, thumbnail
from sdlora.data.images import pixel_hash
from sdlora.events import Progress
from sdlora.training.data import TrainingData

MAX_COMPARED, MAX_DECODED = 24, 4
PHASE = "comparing the images"
SAME_PICTURE = 0.8
"""The `hp_ms` from which two images of a set count as one picture, such as a whole and its crop.

Crops of photographs to 60 % and more of the edge begin at 0.92, of 64-pixel drawings to 80 % at 0.80. Other photographs
of a subject stay below 0.76; of fresh drawings of one caption, 3 % reach it.
"""
OWN_SHARE, NEW_SHARE = 0.55, 0.45
"""How far from a fresh image towards a copy a preview has to be: one from a training caption, compared with that
caption's image as well, and one from a new prompt. Chosen on the runs of docs/measurements/copy-check.md.
"""
ALPHA = 0.02
"""The probability at which a fresh image is as similar as a significant one, over all measures."""
# Mean and standard deviation of the measures that are assumed where a set says little; they count as much as eight of
# its images. Those of "whole" and "detail" were chosen together with the shares, between what a set's images measure
# and what fresh renders of their captions do; those of "features" are what sets of the built-in world measure. SSCD was
# not measured: its values let the shares begin near its authors' threshold of 0.75.
_TYPICAL = {"whole": (0.9, 0.3), "detail": (0.5, 0.12), "sscd": (0.31, 0.15), "features": (0.7, 0.12)}
_TYPICAL_WEIGHT = 8
_LARGEST_PX = 384
_CHUNK = 8  # of images compared between two reports of progress
_MAX_PAIRS = 12_000  # from 500 images on, fewer than 24 are compared
_MOST_SIMILAR = {"features": 0.935}  # a copy that is closer counts no more
_MOST_SIMILAR_ELSE = 0.97
_VERSION = "5"  # incremented when a score's definition changes


@dataclass(frozen=True)
class Gallery:
    """The images that may have been copied.

    Attributes:
        images: By name, as cropped for training, at most 384 px on the longer edge.
        validation: Images of the same kind that are not trained on.
    """

    images: dict[str, Image.Image]
    validation: dict[str, Image.Image]


def make_gallery(trained: Dataset, validation: Dataset | None, background: str) -> Gallery:
    """Read images with their buckets, leaving out validation images that are near-duplicates of training images."""

    def read(dataset: Dataset | None) -> dict[str, Image.Image]:
        return {e.name: reduced(load_pixels(e, background)) for e in (dataset.examples if dataset else ())}

    images, others = read(trained), read(validation)
    count, names = len(images), list(others)
    every = [*images.values(), *others.values()]
    groups = near_duplicates(np.stack([thumbnail(image) for image in every])) if every else []
    twins = {names[i - count] for group in groups if group[0] < count for i in group if i >= count}
    return Gallery(images, {name: image for name, image in others.items() if name not in twins})


def reduced(image: Image.Image) -> Image.Image:
    """An RGB image of at most 384 px on its longer edge, enough for every score, so that a large set fits in memory."""
    if max(image.size) > _LARGEST_PX:
        image = image.copy()
        image.thumbnail((_LARGEST_PX, _LARGEST_PX), Image.Resampling.LANCZOS)
    return image.convert("RGB")


def measures(scores: Tensor, names: Sequence[str]) -> Tensor:
    """What similarity is judged by: of the whole, of detail, which is all that a crop has, and by every network in use.

    Args:
        scores: (..., S).
        names: Of the scores: "hp_ms", "phash" and any others.

    Returns:
        (..., M) float64: the sum of `hp_ms` and of `phash` above chance, `hp_ms` alone, and the others, all on Fisher's
        scale, in standard deviations above what is assumed of fresh images.
    """
    on_scale = [
        fisher_z(2 * score - 1 if name == "phash" else score, _MOST_SIMILAR.get(name, _MOST_SIMILAR_ELSE))
        for name, score in zip(names, scores.unbind(dim=-1), strict=True)
    ]
    found = {
        "whole": on_scale[0] + on_scale[1],
        "detail": on_scale[0],
        **dict(zip(names[2:], on_scale[2:], strict=True)),
    }
    return torch.stack([(found[name] - _TYPICAL[name][0]) / _TYPICAL[name][1] for name in found], dim=-1)


class Scale(NamedTuple):
    """The scale on which the similarity of a preview is judged.

    Attributes:
        among: The highest `measures` of images that copy nothing, (K, M).
        copy: Those of an image of the set that went through the base model's VAE, (M,).
        registered: The highest `registered_correlation` of images that copy nothing, (N,).
    """

    among: Tensor
    copy: Tensor
    registered: Tensor

    def with_fresh(self, found: Tensor) -> Scale:
        """The same with the measures of further images that copy nothing, (N, M)."""
        return self._replace(among=torch.cat([self.among, found]))

    def z_scores(self, found: Tensor, share: Tensor) -> Tensor:
        """How far the measures of images lie above those of fresh ones, in units of their spread: the highest.

        An image is significant if the normal tail of that, times the number of measures, is at most `ALPHA`.

        Mean and variance of fresh images are those of the set's own, shrunk towards those of other subjects: the set's
        are few, and stand further apart than fresh images if they were chosen to. The unit is at least a given share of
        the way from a fresh image to a copy, so that what is significant lies beyond that share.

        Args:
            found: Of every image with every image of the gallery, (P, G, M).
            share: In [0, 1], of each image, (P,).

        Returns:
            (P, G) float64.

        Source: Gelman et al., "Bayesian Data Analysis" (2013), section 3.3 (normal data with a conjugate prior).
        """
        count = len(self.among)
        mean = self.among.sum(dim=0) / (count + _TYPICAL_WEIGHT)  # those of other subjects have mean 0 and spread 1
        squares = (self.among - mean).square().sum(dim=0) + _TYPICAL_WEIGHT
        spread = (squares / (count + _TYPICAL_WEIGHT)).sqrt()
        critical = float(torch.special.ndtri(torch.tensor(1 - ALPHA / found.shape[-1], dtype=torch.float64)))
        least = share.double()[:, None, None] * (self.copy - mean).clamp(min=0) / critical
        return ((found - mean) / torch.maximum(spread, least)).amax(dim=-1)


def set_scale(
    data: TrainingData,
    gallery: Gallery,
    embedders: Embedders,
    decode: Callable[[int], Image.Image],
) -> Generator[Progress, None, Scale]:
    """Compute the scale of a set, or read it from the cache.

    At most 24 training images, evenly spaced, are compared with all others, and as many validation images with all
    training images: the time grows with the number of images, and not with its square. At most four are decoded.

    Args:
        data: The training images.
        gallery: The same images, as previews are compared with them.
        decode: The gallery's image of an index as the base model would draw a copy of it.
    """
    base, cache = data.cache.base, data.cache
    pixels = [[pixel_hash(image) for image in part.values()] for part in (gallery.images, gallery.validation)]
    names = embedders.score_names
    features = "" if embedders.features is None else embedders.features.identity
    key = content_key("scale", _VERSION, json.dumps(pixels), *names, base.vae_identity, features)
    with suppress(LookupError):
        return Scale(**cache.fetch("scale", key, _not_there))
    trained, others = list(gallery.images.values()), list(gallery.validation.values())
    chosen = evenly_spaced(len(trained), num_compared(len(trained)))
    compared = [others[index] for index in evenly_spaced(len(others), num_compared(len(trained)))]
    among, same = [], torch.zeros(len(chosen), len(trained), dtype=torch.bool)
    total = len(chosen) + len(compared)
    for first in range(0, len(chosen), _CHUNK):
        rows = chosen[first : first + _CHUNK]
        all_scores = embedders.scores([trained[i] for i in rows], trained)
        for row, (index, scores) in enumerate(zip(rows, all_scores, strict=True), first):
            same[row] = scores[:, 0] >= SAME_PICTURE
            same[row, index] = True
            if not same[row].all():
                among.append(measures(scores[~same[row]], names).amax(dim=0))
        yield Progress(PHASE, first + len(rows), total)
    copies = [
        measures(embedders.scores([decode(index)], [trained[index]])[0, 0], names)
        for index in evenly_spaced(len(trained), MAX_DECODED)
    ]
    for first in range(0, len(compared), _CHUNK):
        images = compared[first : first + _CHUNK]
        among += list(measures(embedders.scores(images, trained), names).amax(dim=1))
        yield Progress(PHASE, len(chosen) + first + len(images), total)
    found = {
        "among": torch.stack(among) if among else torch.empty(0, len(copies[0]), dtype=torch.float64),
        "copy": torch.stack(copies).mean(dim=0),
        "registered": _registered_among(trained, chosen, same, compared),
    }
    return Scale(**cache.fetch("scale", key, lambda: found, torch.float64))


def num_compared(num_images: int) -> int:
    """At most how many of a set's images are compared with all of them."""
    return min(MAX_COMPARED, max(_CHUNK, _MAX_PAIRS // num_images))


def _not_there() -> dict[str, Tensor]:
    raise LookupError("It is not in the cache yet.")


def _registered_among(
    trained: Sequence[Image.Image], chosen: Sequence[int], same: Tensor, others: Sequence[Image.Image]
) -> Tensor:
    """The highest `registered_correlation` of images with a training image that is another picture."""
    among = registered_correlation([trained[index] for index in chosen], trained, same)
    parts = [among.amax(dim=1)[~same.all(dim=1)]]
    if others:
        parts.append(registered_correlation(others, trained).amax(dim=1))
    return torch.cat(parts)


def evenly_spaced(count: int, most: int) -> list[int]:
    """At most `most` indices of 0 .. count - 1, evenly spaced."""
    chosen = min(count, most)
    return [index * count // chosen for index in range(chosen)]
