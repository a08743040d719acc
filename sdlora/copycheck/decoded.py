"""A set's images as the base model would draw them at best: through its VAE, where that changes them visibly.

Previews come out of the VAE. One that softens images makes a preview of its own copy less similar to the image, and
fresh previews more similar to each other, so that neither is as far apart as it could be. Called by `checker`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sdlora.cache.tensors import content_key
from sdlora.copycheck.scale import MAX_DECODED, Gallery, evenly_spaced, reduced
from sdlora.copycheck.similarity import hp_ms
from sdlora.data.images import pixel_hash, to_tensor
from sdlora.events import Progress
from sdlora.models.base import BaseModel
from sdlora.training.data import TrainingData

PHASE = "decoding the images"
FAITHFUL = 0.9
"""The mean `hp_ms` of images with themselves behind the VAE, from which they are compared as they are."""


class Drawn(NamedTuple):
    """What previews are compared with.

    Attributes:
        gallery: The images.
        copy_of: A training image by its index, as the base model would draw a perfect copy of it.
    """

    gallery: Gallery
    copy_of: Callable[[int], Image.Image]


def as_drawn(data: TrainingData, gallery: Gallery) -> Generator[Progress, None, Drawn]:
    """The gallery behind the VAE, or the gallery itself if the VAE hardly changes a sample of four images.

    Training images are decoded from their cached latents and kept in the cache, validation images are encoded first.
    """
    base, names = data.cache.base, list(gallery.images)

    def decoded(index: int) -> Image.Image:
        return _decoded(data, index, gallery.images[names[index]])

    sample = evenly_spaced(len(names), MAX_DECODED)
    similarity = [float(hp_ms([decoded(index)], [gallery.images[names[index]]])) for index in sample]
    if sum(similarity) >= FAITHFUL * len(similarity):
        return Drawn(gallery, decoded)
    images, validation = {}, {}
    total = len(names) + len(gallery.validation)
    for index, name in enumerate(names):
        images[name] = decoded(index)
        yield Progress(PHASE, len(images), total)
    for name, image in gallery.validation.items():
        validation[name] = through_vae(base, image)
        yield Progress(PHASE, len(images) + len(validation), total)
    return Drawn(Gallery(images, validation), lambda index: through_vae(base, images[names[index]]))


def _decoded(data: TrainingData, index: int, image: Image.Image) -> Image.Image:
    """A training image out of its cached latents, reduced as `image` is."""
    key = content_key("decoded", pixel_hash(image), data.cache.base.vae_identity)

    def decode() -> dict[str, Tensor]:
        return {"pixels": torch.from_numpy(np.array(reduced(_at_mean(data.cache.base, data.moments([index])))))}

    return Image.fromarray(data.cache.fetch("decoded", key, decode, torch.uint8)["pixels"].numpy())


def through_vae(base: BaseModel, image: Image.Image) -> Image.Image:
    """An RGB image encoded and decoded by the VAE of a base model; what does not fill its last latents is cut off."""
    width, height = (max(1, edge // base.latent_factor) * base.latent_factor for edge in image.size)
    return _at_mean(base, base.encode_pixels(to_tensor(image.crop((0, 0, width, height))).unsqueeze(0)))


def _at_mean(base: BaseModel, moments: Tensor) -> Image.Image:
    latents = base.sample_latents(moments, torch.zeros_like(moments.chunk(2, dim=1)[0]))
    return base.decode_latents(latents)[0]
