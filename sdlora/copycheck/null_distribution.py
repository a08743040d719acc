"""What likeness there is where nothing was copied: between training pictures, and in what the base draws.

The null has at least 100 scores, since a test at 2 % needs as many to bear an odd one. The base's pictures are
drawn once and kept, and so are the scores, under the hash of everything that they follow from.
Shapes: K pictures of the null, G pictures of the gallery, S scores.
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
    """The pictures that may have been copied.

    Attributes:
        pictures: By name, as cropped for training, at most 384 px on the longer edge.
        heldout: Pictures of the same kind that were not trained.
    """

    pictures: dict[str, Image.Image]
    heldout: dict[str, Image.Image]


def make_gallery(trained: Dataset, heldout: Dataset | None, background: str) -> Gallery:
    """Read the pictures; a held-out one that is a near-duplicate of a trained one is left out.

    Args:
        trained: The pictures that may have been copied, their buckets assigned.
        heldout: Other pictures of the same kind.
        background: Colour under transparent pixels.
    """

    def read(dataset: Dataset | None) -> dict[str, Image.Image]:
        return {e.name: reduced(load_pixels(e, background)) for e in (dataset.examples if dataset else ())}

    pictures, others = read(trained), read(heldout)
    count, names = len(pictures), list(others)
    groups = _twins([*pictures.values(), *others.values()])
    twins = {names[i - count] for group in groups if group[0] < count for i in group if i >= count}
    return Gallery(pictures, {name: picture for name, picture in others.items() if name not in twins})


def reduced(picture: Image.Image) -> Image.Image:
    """A picture of at most 384 px on its longer edge: scores look no closer, and a large set fits into memory."""
    if max(picture.size) > _LARGEST_PX:
        picture = picture.copy()
        picture.thumbnail((_LARGEST_PX, _LARGEST_PX), Image.Resampling.LANCZOS)
    return picture.convert("RGB")


def null_scores(gallery: Gallery, drawn: Sequence[Image.Image], arbiters: Arbiters) -> Tensor:
    """The highest scores that pictures reach which are no copies, (K, S).

    Args:
        gallery: Every training picture is compared with the others, but for its near-duplicates; every held-out
            picture with all of them.
        drawn: Pictures of the base without an adapter, compared with all of them.
        arbiters: They say which scores there are.
    """
    trained = list(gallery.pictures.values())
    among = arbiters.scores(trained, trained)
    alike = _same_or_twins(trained)
    alone = alike.all(dim=1)
    among[alike] = -torch.inf
    parts = [among.amax(dim=1)[~alone]]
    others = [*gallery.heldout.values(), *drawn]
    if others:
        parts.append(arbiters.scores(others, trained).amax(dim=1))
    return torch.cat(parts)


class NullMaker:
    """Makes the null of a run, or finds it in the cache.

    Args:
        cache: Where pictures and scores are kept; its base draws.
        adapter: Switched off for drawing.
        request: What previews are drawn, for their prompts and settings.
        gallery: The training and the held-out pictures.
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
        known = len(gallery.pictures) + len(gallery.heldout)
        self._wanted = self._base_requests(max(FEWEST_OF_BASE, SIZE - known))
        self.scores: Tensor | None = None
        self.registered: Tensor | None = None

    def _base_requests(self, count: int) -> list[tuple[str, int]]:
        """Prompts and seeds of the base's pictures: each prompt in turn."""
        prompts = list(dict.fromkeys(self._request.prompts))
        return [(prompts[i % len(prompts)], _FIRST_SEED + i // len(prompts)) for i in range(count)]

    def make(self) -> Iterator[Progress]:
        """Set `scores`, (K, S), and `registered`, see `registered_null`; draw what is missing for them."""
        pixels = [[pixel_hash(p) for p in part.values()] for part in (self._gallery.pictures, self._gallery.heldout)]
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
            for pictures in draw(self._base, self._request, [wanted for wanted, _ in missing]):
                for picture in pictures:
                    with atomic_path(missing[done][1]) as temporary:
                        picture.save(temporary, format="PNG")
                    done += 1
                yield Progress(PHASE, done, len(missing))


def registered_null(gallery: Gallery, most: int) -> Tensor:
    """How alike the set's pictures are once registered: each with its likeliest other, near-duplicates left out, (K,).

    Args:
        gallery: The trained pictures are compared with one another, held-out ones with the trained.
        most: So many of either are, spread over all.
    """
    trained, heldout = list(gallery.pictures.values()), list(gallery.heldout.values())
    chosen = spread_over(len(trained), most)
    alike = _same_or_twins(trained)[chosen]
    parts = [registered([trained[index] for index in chosen], trained, alike).amax(dim=1)[~alike.all(dim=1)]]
    if heldout:
        parts.append(registered([heldout[index] for index in spread_over(len(heldout), most)], trained).amax(dim=1))
    return torch.cat(parts)


def spread_over(count: int, most: int) -> list[int]:
    """At most `most` of 0 .. count - 1, as evenly spread as can be."""
    chosen = min(count, most)
    return [index * count // chosen for index in range(chosen)]


def _same_or_twins(pictures: Sequence[Image.Image]) -> Tensor:
    """Which pairs are one picture or near-duplicates, (P, P)."""
    alike = torch.eye(len(pictures), dtype=torch.bool)
    for group in _twins(pictures):
        alike[np.ix_(group, group)] = True
    return alike


def _twins(pictures: Sequence[Image.Image]) -> list[tuple[int, ...]]:
    return near_duplicates(np.stack([thumbnail(picture) for picture in pictures])) if pictures else []
