"""The null distribution of similarity: scores between different training images, and of the base model's images.

Computed once per run and read by `verdict` and `signals`. It has at least 100 scores, so that a test at 2 % tolerates
an outlier. The images and the scores are cached under the hash of everything they depend on.
Shapes: K images of the null distribution, G images of the gallery, S scores.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sdlora.cache.tensors import Cache, content_key
from sdlora.common.files import atomic_path
from sdlora.copycheck.embedders import Embedders
from sdlora.copycheck.similarity import registered_correlation
from sdlora.data.dataset import Dataset, load_pixels
from sdlora.data.duplicates import near_duplicates, thumbnail
from sdlora.data.images import pixel_hash
from sdlora.events import Progress
from sdlora.lora.inject import Adapter
from sdlora.previews.sampler import PreviewRequest, draw, settings

SIZE = 100
MIN_DRAWN = 24
MAX_REGISTERED = 24
PHASE = "the base's pictures"
_FIRST_SEED = 1_000_000  # unlike any preview's, so that null and previews do not share noise
_LARGEST_PX = 384
_VERSION = "3"  # incremented when a score's definition changes


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
    groups = _groups([*images.values(), *others.values()])
    twins = {names[i - count] for group in groups if group[0] < count for i in group if i >= count}
    return Gallery(images, {name: image for name, image in others.items() if name not in twins})


def reduced(image: Image.Image) -> Image.Image:
    """An RGB image of at most 384 px on its longer edge, enough for every score, so that a large set fits in memory."""
    if max(image.size) > _LARGEST_PX:
        image = image.copy()
        image.thumbnail((_LARGEST_PX, _LARGEST_PX), Image.Resampling.LANCZOS)
    return image.convert("RGB")


def null_scores(gallery: Gallery, drawn: Sequence[Image.Image], embedders: Embedders) -> Tensor:
    """The highest scores of images that are not copies, (K, S).

    Args:
        gallery: Every training image is compared with the others except its near-duplicates, and every validation
            image with all of them.
        drawn: Images of the base model without an adapter, compared with all training images.
    """
    trained = list(gallery.images.values())
    among = embedders.scores(trained, trained)
    excluded = _same_or_near_duplicate(trained)
    among[excluded] = -torch.inf
    parts = [among.amax(dim=1)[~excluded.all(dim=1)]]
    others = [*gallery.validation.values(), *drawn]
    if others:
        parts.append(embedders.scores(others, trained).amax(dim=1))
    return torch.cat(parts)


def null_distribution(
    cache: Cache, adapter: Adapter, request: PreviewRequest, gallery: Gallery, identity: str, embedders: Embedders
) -> Generator[Progress, None, tuple[Tensor, Tensor]]:
    """Compute a run's null distribution, drawing the images that are missing for it, or read it from the cache.

    Args:
        cache: Holds images and scores; its base draws.
        adapter: Disabled while drawing.
        request: The run's previews, for their prompts and settings.
        identity: A hash of the frozen UNet.
        embedders: They decide which scores there are.

    Returns:
        `null_scores`, (K, S), and `registered_null_scores`, (K,).
    """
    base = cache.base
    identities = (identity, base.vae_identity, base.text_identity)
    drawn_by = content_key("drawn by the base", *identities, json.dumps(settings(base, request)))
    prompts = list(dict.fromkeys(request.prompts))
    missing: list[tuple[tuple[str, int], Path]] = []
    files = []
    for index in range(max(MIN_DRAWN, SIZE - len(gallery.images) - len(gallery.validation))):
        prompt, seed = prompts[index % len(prompts)], _FIRST_SEED + index // len(prompts)
        key = content_key(drawn_by, prompt, str(seed))
        files.append(cache.folder / "drawn" / key[:2] / f"{key}.png")
        if not files[-1].exists():
            missing.append(((prompt, seed), files[-1]))
    pixels = [[pixel_hash(image) for image in part.values()] for part in (gallery.images, gallery.validation)]
    key = content_key("null", _VERSION, json.dumps(pixels), *embedders.score_names, *(file.stem for file in files))
    if not cache.holds("null", key):
        done = 0
        with adapter.disabled():
            for images in draw(base, request, [wanted for wanted, _ in missing]):
                for image in images:
                    with atomic_path(missing[done][1]) as temporary:
                        image.save(temporary, format="PNG")
                    done += 1
                yield Progress(PHASE, done, len(missing))

    def compute() -> dict[str, Tensor]:
        drawn = [reduced(Image.open(file)) for file in files]
        scores = null_scores(gallery, drawn, embedders)
        return {"scores": scores, "registered": registered_null_scores(gallery, MAX_REGISTERED)}

    found = cache.fetch("null", key, compute)
    return found["scores"], found["registered"]


def registered_null_scores(gallery: Gallery, most: int) -> Tensor:
    """The highest `registered_correlation` of each of the set's images with another, near-duplicates excluded, (K,).

    Args:
        gallery: Training images are compared with each other, validation images with training images.
        most: At most this many of either are compared, evenly spaced.
    """
    trained, validation = list(gallery.images.values()), list(gallery.validation.values())
    chosen = evenly_spaced(len(trained), most)
    excluded = _same_or_near_duplicate(trained)[chosen]
    among = registered_correlation([trained[index] for index in chosen], trained, excluded)
    parts = [among.amax(dim=1)[~excluded.all(dim=1)]]
    if validation:
        others = [validation[index] for index in evenly_spaced(len(validation), most)]
        parts.append(registered_correlation(others, trained).amax(dim=1))
    return torch.cat(parts)


def evenly_spaced(count: int, most: int) -> list[int]:
    """At most `most` indices of 0 .. count - 1, evenly spaced."""
    chosen = min(count, most)
    return [index * count // chosen for index in range(chosen)]


def _same_or_near_duplicate(images: Sequence[Image.Image]) -> Tensor:
    """Which pairs are the same image or near-duplicates, (P, P)."""
    similar = torch.eye(len(images), dtype=torch.bool)
    for group in _groups(images):
        similar[np.ix_(group, group)] = True
    return similar


def _groups(images: Sequence[Image.Image]) -> list[tuple[int, ...]]:
    return near_duplicates(np.stack([thumbnail(image) for image in images])) if images else []
