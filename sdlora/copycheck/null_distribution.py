"""What similarity there is where nothing was copied: between training images, and in what the base draws.

The null has at least 100 scores, since a test at 2 % needs as many to bear an odd one. The base's images are
drawn once and kept, and so are the scores, under the hash of everything that they follow from.
Shapes: K images of the null, G images of the gallery, S scores.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sdlora.cache.tensors import Cache, content_key
from sdlora.common.files import atomic_path
from sdlora.copycheck.embedders import Arbiters
from sdlora.copycheck.warp_alignment import registered
from sdlora.data.dataset import Dataset, load_pixels
from sdlora.data.duplicates import near_duplicates, thumbnail
from sdlora.data.images import pixel_hash
from sdlora.events import Progress
from sdlora.lora.inject import Adapter
from sdlora.previews.sampler import PreviewRequest, draw, settings

SIZE = 100
FEWEST_OF_BASE = 24
MOST_REGISTERED = 24
PHASE = "the base's pictures"
_FIRST_SEED = 1_000_000  # no preview's, so that the null is not drawn from the very noise that is judged
_LARGEST_PX = 384
_VERSION = "3"  # raised when a score is computed in another way


@dataclass(frozen=True)
class Gallery:
    """The images that may have been copied.

    Attributes:
        images: By name, as cropped for training, at most 384 px on the longer edge.
        heldout: Images of the same kind that were not trained.
    """

    images: dict[str, Image.Image]
    validation: dict[str, Image.Image]


def make_gallery(trained: Dataset, validation: Dataset | None, background: str) -> Gallery:
    """Read the images; a validation one that is a near-duplicate of a trained one is left out.

    Args:
        trained: The images that may have been copied, their buckets assigned.
        heldout: Other images of the same kind.
        background: Colour under transparent pixels.
    """

    def read(dataset: Dataset | None) -> dict[str, Image.Image]:
        return {e.name: reduced(load_pixels(e, background)) for e in (dataset.examples if dataset else ())}

    images, others = read(trained), read(validation)
    count, names = len(images), list(others)
    groups = _twins([*images.values(), *others.values()])
    twins = {names[i - count] for group in groups if group[0] < count for i in group if i >= count}
    return Gallery(images, {name: image for name, image in others.items() if name not in twins})


def reduced(image: Image.Image) -> Image.Image:
    """An image of at most 384 px on its longer edge: scores look no closer, and a large set fits into memory."""
    if max(image.size) > _LARGEST_PX:
        image = image.copy()
        image.thumbnail((_LARGEST_PX, _LARGEST_PX), Image.Resampling.LANCZOS)
    return image.convert("RGB")


def null_scores(gallery: Gallery, drawn: Sequence[Image.Image], arbiters: Arbiters) -> Tensor:
    """The highest scores that images reach which are no copies, (K, S).

    Args:
        gallery: Every training image is compared with the others, but for its near-duplicates; every validation
            image with all of them.
        drawn: Images of the base without an adapter, compared with all of them.
        arbiters: They say which scores there are.
    """
    trained = list(gallery.images.values())
    among = arbiters.scores(trained, trained)
    similar = _same_or_twins(trained)
    alone = similar.all(dim=1)
    among[similar] = -torch.inf
    parts = [among.amax(dim=1)[~alone]]
    others = [*gallery.validation.values(), *drawn]
    if others:
        parts.append(arbiters.scores(others, trained).amax(dim=1))
    return torch.cat(parts)


class NullMaker:
    """Makes the null of a run, or finds it in the cache.

    Args:
        cache: Where images and scores are kept; its base draws.
        adapter: Switched off for drawing.
        request: What previews are drawn, for their prompts and settings.
        gallery: The training and the validation images.
        identity: A hash of the frozen UNet.
        arbiters: They say which scores there are.
    """

    def __init__(
        self,
        cache: Cache,
        adapter: Adapter,
        request: PreviewRequest,
        gallery: Gallery,
        identity: str,
        arbiters: Arbiters,
    ) -> None:
        self._base, self._adapter, self._request, self._arbiters = cache.base, adapter, request, arbiters
        self._gallery, self._cache = gallery, cache
        self._drawn_by = content_key(
            "drawn by the base",
            identity,
            cache.base.vae_identity,
            cache.base.text_identity,
            json.dumps(settings(cache.base, request)),
        )
        known = len(gallery.images) + len(gallery.validation)
        self._wanted = self._base_requests(max(FEWEST_OF_BASE, SIZE - known))
        self.scores: Tensor | None = None
        self.registered: Tensor | None = None

    def _base_requests(self, count: int) -> list[tuple[str, int]]:
        """Prompts and seeds of the base's images: each prompt in turn."""
        prompts = list(dict.fromkeys(self._request.prompts))
        return [(prompts[i % len(prompts)], _FIRST_SEED + i // len(prompts)) for i in range(count)]

    def make(self) -> Iterator[Progress]:
        """Set `scores`, (K, S), and `registered`, see `registered_null`; draw what is missing for them."""
        pixels = [[pixel_hash(p) for p in part.values()] for part in (self._gallery.images, self._gallery.validation)]
        files = [self._file(prompt, seed) for prompt, seed in self._wanted]
        key = content_key(
            "null", _VERSION, json.dumps(pixels), *self._arbiters.score_names, *(file.stem for file in files)
        )
        if not self._cache.holds("null", key):
            yield from self._draw(files)

        def compute() -> dict[str, Tensor]:
            drawn = [reduced(Image.open(file)) for file in files]
            scores = null_scores(self._gallery, drawn, self._arbiters)
            return {"scores": scores, "registered": registered_null(self._gallery, MOST_REGISTERED)}

        found = self._cache.fetch("null", key, compute)
        self.scores, self.registered = found["scores"], found["registered"]

    def _file(self, prompt: str, seed: int) -> Path:
        key = content_key(self._drawn_by, prompt, str(seed))
        return self._cache.folder / "drawn" / key[:2] / f"{key}.png"

    def _draw(self, files: Sequence[Path]) -> Iterator[Progress]:
        missing = [(wanted, file) for wanted, file in zip(self._wanted, files, strict=True) if not file.exists()]
        done = 0
        with self._adapter.disabled():
            for images in draw(self._base, self._request, [wanted for wanted, _ in missing]):
                for image in images:
                    with atomic_path(missing[done][1]) as temporary:
                        image.save(temporary, format="PNG")
                    done += 1
                yield Progress(PHASE, done, len(missing))


def registered_null(gallery: Gallery, most: int) -> Tensor:
    """How alike the set's images are once registered: each with its likeliest other, near-duplicates left out, (K,).

    Args:
        gallery: The trained images are compared with one another, validation ones with the trained.
        most: So many of either are, spread over all.
    """
    trained, validation = list(gallery.images.values()), list(gallery.validation.values())
    chosen = spread_over(len(trained), most)
    similar = _same_or_twins(trained)[chosen]
    parts = [registered([trained[index] for index in chosen], trained, similar).amax(dim=1)[~similar.all(dim=1)]]
    if validation:
        parts.append(
            registered([validation[index] for index in spread_over(len(validation), most)], trained).amax(dim=1)
        )
    return torch.cat(parts)


def spread_over(count: int, most: int) -> list[int]:
    """At most `most` of 0 .. count - 1, as evenly spread as can be."""
    chosen = min(count, most)
    return [index * count // chosen for index in range(chosen)]


def _same_or_twins(images: Sequence[Image.Image]) -> Tensor:
    """Which pairs are one image or near-duplicates, (P, P)."""
    similar = torch.eye(len(images), dtype=torch.bool)
    for group in _twins(images):
        similar[np.ix_(group, group)] = True
    return similar


def _twins(images: Sequence[Image.Image]) -> list[tuple[int, ...]]:
    return near_duplicates(np.stack([thumbnail(image) for image in images])) if images else []
