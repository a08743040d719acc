"""Latent moments and text embeddings on disk, each computed once and keyed by a hash of its inputs.

A key covers the content (the cropped pixels, or the caption) and the identity of the network, so a file is either right
or missing: a changed caption recomputes that caption and nothing else. Both are stored in float16, whose rounding error
(.05 %) is an eighth of that of bfloat16, in which most base models compute.
Shapes: C latent channels, H/W pixels, h/w latents.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from platformdirs import user_cache_dir
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sdlora.common.files import atomic_path
from sdlora.data.dataset import Example, load_mask_pixels, load_pixels
from sdlora.data.images import mask_shares, pixel_hash, to_tensor
from sdlora.errors import ConfigError, DataError, DivergedError
from sdlora.events import Progress
from sdlora.models.base import BaseModel, TextEmbeddings

MOST_MAPPED = 30_000
"""The most files that are mapped into memory; Linux allows a process 65,530 maps."""
_READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)
_FORMAT = "2"  # increased when the meaning of stored tensors changes


class Cache:
    """A folder of small safetensors files; those of this run are memory-mapped.

    Mapped tensors live in the page cache, which the system reclaims when memory is short. The base model's VAE and text
    encoders compute them. Without a folder, they are in the user's cache folder.

    Attributes:
        keeps_text: Whether captions are encoded once and kept; otherwise they are encoded at every use, with the same
            result.

    Raises:
        ConfigError: The folder cannot be created.
    """

    def __init__(self, folder: Path | None, base: BaseModel) -> None:
        self.folder = (folder or Path(user_cache_dir("sdlora")) / "tensors").expanduser()
        self.base = base
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"cache.dir: cannot create {self.folder} ({error.strerror}). Choose a folder that you can write to."
            ) from error
        self.keeps_text = True
        self._masks: dict[Example, Tensor] = {}
        self._moment_keys: dict[Example, str] = {}
        self._keys: dict[Example, str] = {}
        self._text_keys: dict[str, str] = {}
        self._mapped: dict[str, TextEmbeddings] = {}

    @property
    def is_writable(self) -> bool:
        """Whether entries can be added."""
        return os.access(self.folder, os.W_OK)

    def knows(self, example: Example) -> bool:
        """Whether an image is in the cache of this run."""
        return example in self._keys

    def moments(self, examples: Sequence[Example]) -> Tensor:
        """The VAE's posterior moments of cached images of one size, (B, 2C, h, w) float16 on the CPU."""
        return torch.stack([self._filled("moments", self._moment_keys[example])["moments"] for example in examples])

    def mask(self, example: Example) -> Tensor | None:
        """The loss mask of a cached image, (1, h, w) in [0, 1]; None if it has none."""
        return self._masks.get(example)

    def identity(self, example: Example) -> str:
        """A hash of a cached image, its mask, its caption, and the VAE and text encoders that encoded them."""
        return content_key(self._keys[example], content_key("text", self.base.text_identity, example.caption))

    def text(self, captions: Sequence[str]) -> TextEmbeddings:
        """Text embeddings of cached captions, or of any if text is not kept: batch first, float32 on the CPU."""
        found = [
            self._filled("text", self._text_keys[caption]) if self.keeps_text else self._encoded(caption)
            for caption in captions
        ]
        return self.base.batched(found)

    def fill_moments(self, examples: Sequence[Example], background: str) -> Iterator[Progress]:
        """Encode the images that are not on disk yet, with `background` behind transparent pixels."""
        for done, example in enumerate(examples, start=1):
            image = load_pixels(example, background)
            key = content_key("moments", self.base.vae_identity, pixel_hash(image))

            def encode(image: Image.Image = image) -> TextEmbeddings:
                return {"moments": self.base.encode_pixels(to_tensor(image).unsqueeze(0))[0]}

            tensors = self.fetch("moments", key, encode, torch.float16)
            if not bool(tensors["moments"].isfinite().all()):
                self._path("moments", key).unlink()
                raise DivergedError(
                    f"The VAE returns NaN or infinite values for {example.name}. Remove the image, or use a base "
                    "model whose VAE works in float16."
                )
            self._map(key, tensors)
            self._keys[example] = self._moment_keys[example] = key
            # Not cached: reading a mask is all the work there is.
            if (mask := load_mask_pixels(example)) is not None:
                self._masks[example] = mask_shares(mask, *tensors["moments"].shape[1:])
                self._keys[example] = content_key(key, pixel_hash(mask))
            yield Progress("cache pictures", done, len(examples))

    def fill_text(self, captions: Iterable[str]) -> Iterator[Progress]:
        """Encode the captions that are not on disk yet, if text is kept."""
        if not self.keeps_text:
            return
        wanted = list(dict.fromkeys(captions))
        for done, caption in enumerate(wanted, start=1):
            key = content_key("text", self.base.text_identity, caption)
            self._map(key, self.fetch("text", key, partial(self._encode, caption), self.base.text_dtype))
            self._text_keys[caption] = key
            yield Progress("cache captions", done, len(wanted))

    def text_bytes(self, num_captions: int) -> int:
        """The size of the embeddings of a number of captions, on disk and in memory."""
        return num_captions * sum(value.nbytes for value in self._encoded("").values())

    def _encode(self, caption: str) -> TextEmbeddings:
        # One at a time: the embeddings of a caption must not depend on its batch.
        return {name: value[0] for name, value in self.base.encode_captions([caption]).items()}

    def _encoded(self, caption: str) -> TextEmbeddings:
        return _as_kept(partial(self._encode, caption), self.base.text_dtype)

    def holds(self, kind: str, key: str) -> bool:
        """Whether there is an entry under a key."""
        return self._path(kind, key).exists()

    def fetch(
        self, kind: str, key: str, make: Callable[[], TextEmbeddings], dtype: torch.dtype = torch.float32
    ) -> TextEmbeddings:
        """The entry under a key in the subfolder of a kind, computed and stored in a dtype if it is missing.

        The key is from `content_key`, of everything that the tensors depend on. The tensors are mapped, not yet read.

        Raises:
            ConfigError: The entry is missing, and the folder is read-only.
        """
        path = self._path(kind, key)
        if path.exists():
            try:
                return load_file(path)
            except (SafetensorError, OSError):
                path.unlink(missing_ok=True)  # damaged by a crash: computed again below
        try:
            with atomic_path(path) as temporary:
                save_file(_as_kept(make, dtype), temporary)
        except OSError as error:
            if error.errno not in _READ_ONLY:
                raise
            raise ConfigError(
                f"cache.dir: {self.folder} does not hold everything that this run needs, and cannot be written "
                f"({error.strerror}). Choose a folder that you can write to."
            ) from error
        return load_file(path)

    def _map(self, key: str, tensors: TextEmbeddings) -> None:
        """Keep tensors mapped up to the limit; the others are mapped at every use."""
        if len(self._mapped) < MOST_MAPPED:
            self._mapped.setdefault(key, tensors)

    def _filled(self, kind: str, key: str) -> TextEmbeddings:
        mapped = self._mapped.get(key)
        if mapped is not None:
            return mapped
        try:
            return load_file(self._path(kind, key))
        except (SafetensorError, OSError) as error:
            raise DataError(
                f"{self._path(kind, key)} disappeared from the cache or is damaged ({error}). Run again with "
                "--resume, which computes it again, and let nothing delete the cache meanwhile."
            ) from error

    def _path(self, kind: str, key: str) -> Path:
        return self.folder / kind / key[:2] / f"{key}.safetensors"


@torch.no_grad()
def _as_kept(make: Callable[[], TextEmbeddings], dtype: torch.dtype) -> TextEmbeddings:
    """Tensors as they come back from disk, so that a cache hit and a miss give the same values."""
    return {name: value.to(dtype).cpu().contiguous() for name, value in make().items()}


def content_key(*parts: str) -> str:
    """A hash of strings, in their order, for file names."""
    return hashlib.blake2b("\x1f".join([_FORMAT, *parts]).encode("utf-8"), digest_size=20).hexdigest()
