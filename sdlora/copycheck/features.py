"""A similarity score by the base model's own UNet, which finds copies that were redrawn, with other details.

Called for a set's scale and the previews. The UNet is asked about every image once, without adapter, at little noise
and with an empty caption; what its last block knows of the image is compared cell by cell. A mirrored copy is not
found.
Shapes: P images, G images of a gallery, C channels, K channels that are kept, h/w cells, u/v frequencies.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from sdlora.cache.tensors import Cache, content_key
from sdlora.copycheck.similarity import require_images
from sdlora.data.dataset import Example
from sdlora.data.images import pixel_hash, to_tensor
from sdlora.events import Progress
from sdlora.models.base import BaseModel, TextEmbeddings

PHASE = "looking at the images"
TIMESTEP = 60
SHORT_PX = 192
"""Larger images are reduced to this short edge, at which looking at one takes a seventh of the work at 512 px."""
_CELLS = 24  # along the short edge, at most
_MOST_CHANNELS = 64
_FLOOR = 1e-3  # weaker channels, in shares of the strongest one's variance, are not enlarged to its strength
_MAX_FITTED = 64  # images that the channels are chosen by
_OVERLAP = 0.25  # of the smaller image's cells
_BATCH = 4
_CHUNK = 128
_VERSION = "1"


def feature_block(network: nn.Module) -> nn.Module | None:
    """The block whose output is compared: the last one of a UNet on its way up; None in a transformer."""
    blocks = getattr(network, "up_blocks", None)
    return blocks[-1] if blocks else None


class Features:
    """What the UNet of a base model knows of images.

    Args:
        block: From `feature_block`.
        network_identity: A hash of the UNet.
        off: A context without adapter.
        like: An image of the set, on whose size the UNet of Stable Diffusion XL is conditioned.

    Attributes:
        identity: A hash of all networks that take part.

    Source: Tang et al. 2306.03881, "Emergent correspondence from image diffusion".
    """

    def __init__(
        self,
        base: BaseModel,
        block: nn.Module,
        network_identity: str,
        off: Callable[[], AbstractContextManager[Any]],
        like: Example,
    ) -> None:
        self.identity = content_key(_VERSION, network_identity, base.vae_identity, base.text_identity)
        self._base, self._block, self._off, self._like = base, block, off, like
        self._known: dict[str, Tensor] = {}
        self._text: TextEmbeddings | None = None

    def fit(self, images: Sequence[Image.Image], cache: Cache) -> Generator[Progress, None, None]:
        """Choose the channels that set a gallery's images apart, and remember its images, or read both from the cache.

        Source: whitening by principal components, as in Jegou & Chum 2012, "Negative evidences and co-occurences in
        image retrieval".
        """
        hashes = [pixel_hash(image) for image in images]
        key = content_key("features", json.dumps(hashes), self.identity)
        with suppress(LookupError):
            self._remember(hashes, cache.fetch("features", key, _not_there))
            return
        step = -(-len(images) // _MAX_FITTED)
        order = sorted(range(len(images)), key=lambda index: index % step != 0)
        num_fitted = len(range(0, len(images), step))
        waiting, found = dict[int, Tensor](), dict[str, Tensor]()
        for done, index in enumerate(order, start=1):
            (waiting[index],) = self._raw([images[index]])
            if done == num_fitted:
                self._mean, self._projection = _whitening(list(waiting.values()))
            if done >= num_fitted:
                found |= {str(one): self._whitened(raw) for one, raw in waiting.items()}
                waiting.clear()
            yield Progress(PHASE, done, len(images))
        found |= {"mean": self._mean, "projection": self._projection}
        self._remember(hashes, cache.fetch("features", key, lambda: found))

    def _remember(self, hashes: Sequence[str], found: TextEmbeddings) -> None:
        self._mean, self._projection = found["mean"], found["projection"]
        self._known = {key: found[str(index)] for index, key in enumerate(hashes)}

    def similarity(self, images: Sequence[Image.Image], gallery: Sequence[Image.Image]) -> Tensor:
        """`agreement` of every image with every image of a gallery, (P, G); `fit` comes first."""
        require_images(images, gallery)
        return agreement(self._cells(images), self._cells(gallery))

    def _cells(self, images: Sequence[Image.Image]) -> list[Tensor]:
        """Unit vectors of whitened channels, each (K, h, w)."""
        hashes = [pixel_hash(image) for image in images]
        missing = {key: image for key, image in zip(hashes, images, strict=True) if key not in self._known}
        new = dict(zip(missing, map(self._whitened, self._raw(list(missing.values()))), strict=True))
        return [self._known[key] if key in self._known else new[key] for key in hashes]

    def _whitened(self, raw: Tensor) -> Tensor:
        return F.normalize(torch.einsum("chw,ck->khw", raw - self._mean[:, None, None], self._projection), dim=0)

    @torch.no_grad()
    def _raw(self, images: Sequence[Image.Image]) -> list[Tensor]:
        """The block's output, with at most 24 cells along the short edge, each (C, h, w)."""
        sized = [_sized(image, self._base.latent_factor) for image in images]
        found: list[Tensor] = [torch.empty(0)] * len(images)
        for size in dict.fromkeys(image.size for image in sized):
            same = [index for index, image in enumerate(sized) if image.size == size]
            for first in range(0, len(same), _BATCH):
                batch = same[first : first + _BATCH]
                for index, own in zip(batch, self._asked([sized[index] for index in batch]), strict=True):
                    found[index] = own
        return found

    def _asked(self, images: Sequence[Image.Image]) -> Tensor:
        base = self._base
        with self._off():
            if self._text is None:
                text = base.encode_captions([""]) | base.size_conditions([self._like])
                self._text = {name: value.to(base.device) for name, value in text.items()}
            moments = base.encode_pixels(torch.stack([to_tensor(image) for image in images]))
            nothing = torch.zeros_like(moments.chunk(2, dim=1)[0])
            timesteps = torch.full((len(images),), TIMESTEP, device=base.device)
            noisy = base.levels.mix(base.sample_latents(moments, nothing), nothing, timesteps)
            text = {name: value.expand(len(images), *value.shape[1:]) for name, value in self._text.items()}
            with _output(self._block) as seen:
                base.predict(noisy, timesteps, text)
        values = seen[0].float().cpu()
        return F.avg_pool2d(values, max(1, min(values.shape[2:]) // _CELLS))


def _not_there() -> TextEmbeddings:
    raise LookupError("It is not in the cache yet.")


def _sized(image: Image.Image, step_px: int) -> Image.Image:
    """An image of at most 192 px on its short edge, with edges that the VAE can halve."""
    ratio = min(1.0, SHORT_PX / min(image.size))
    width, height = (max(1, round(edge * ratio / step_px)) * step_px for edge in image.size)
    return image if image.size == (width, height) else image.resize((width, height), Image.Resampling.LANCZOS)


@contextmanager
def _output(block: nn.Module) -> Iterator[list[Tensor]]:
    seen: list[Tensor] = []
    handle = block.register_forward_hook(lambda _, __, out: seen.append(out if isinstance(out, Tensor) else out[0]))
    try:
        yield seen
    finally:
        handle.remove()


def _whitening(raw: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The mean of channels, (C,), and what makes them uncorrelated and equally strong, (C, K), over all cells."""
    cells = torch.cat([values.flatten(1) for values in raw], dim=1).double()
    mean = cells.mean(dim=1)
    centred = cells - mean[:, None]
    variances, directions = torch.linalg.eigh(centred @ centred.T / cells.shape[1])
    kept = directions[:, -_MOST_CHANNELS:] / variances[-_MOST_CHANNELS:].clamp(min=float(variances[-1]) * _FLOOR).sqrt()
    return mean.float(), kept.float()


def agreement(images: Sequence[Tensor], gallery: Sequence[Tensor]) -> Tensor:
    """The mean cosine of the cells of two images that lie over each other, at the best displacement.

    At least a quarter of the smaller image's cells have to lie over each other.

    Args:
        images: P, of unit vectors, each (K, h, w); h and w may differ from one to another.
        gallery: G of the same.

    Returns:
        (P, G) float32 in [-1, 1]; 1 is a copy.
    """
    scores = torch.empty(len(images), len(gallery))
    for shape in dict.fromkeys(values.shape for values in images):
        rows = [index for index, values in enumerate(images) if values.shape == shape]
        for other in dict.fromkeys(values.shape for values in gallery):
            columns = [index for index, values in enumerate(gallery) if values.shape == other]
            size = shape[1] + other[1] - 1, shape[2] + other[2] - 1
            seen = torch.fft.rfft2(torch.stack([images[row] for row in rows]), s=size).conj()
            ones = torch.fft.rfft2(torch.ones(shape[1:]), s=size).conj() * torch.fft.rfft2(
                torch.ones(other[1:]), s=size
            )
            counts = torch.fft.irfft2(ones, s=size).round()
            allowed = counts >= _OVERLAP * min(shape[1] * shape[2], other[1] * other[2])
            for first in range(0, len(columns), _CHUNK):
                chunk = columns[first : first + _CHUNK]
                known = torch.fft.rfft2(torch.stack([gallery[column] for column in chunk]), s=size)
                sums = torch.fft.irfft2(torch.einsum("pkuv,gkuv->pguv", seen, known), s=size)
                best = (sums[..., allowed] / counts[allowed]).amax(dim=-1)
                scores[torch.tensor(rows)[:, None], torch.tensor(chunk)] = best.clamp(-1, 1)
    return scores
