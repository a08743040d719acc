"""Latent moments and text states, computed once and kept on disk under the hash of what they were made from.

A key holds the content (pixels after the crop, or the caption) and the identity of the network, so that a
file is either right or not there: a changed caption recomputes that caption and nothing else. Both are kept in
float16, whose rounding (.05 %) is an eighth of bfloat16's, in which most bases compute.
Shapes: C latent channels, H/W pixels, h/w latents.
"""

from __future__ import annotations

import hashlib
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
from sdlora.data.images import pixel_hash, to_tensor
from sdlora.data.masks import mask_shares
from sdlora.errors import ConfigError, DataError, DivergedError
from sdlora.events import Progress
from sdlora.models.base import BaseModel, TextEmbeddings

MOST_MAPPED = 30_000
"""So many files are mapped into memory at most; Linux lets a process have 65,530 maps."""
_FORMAT = "2"  # raised when what is stored under a key changes its meaning


class Cache:
    """A folder of small safetensors files, those of this run mapped into memory.

    Mapped numbers lie in the system's own cache of files, which gives way where memory is short.

    Args:
        folder: Where the files are; None takes the user's cache folder.
        base: The model whose VAE and text encoder fill the cache.

    Attributes:
        keeps_text: Whether captions are encoded before they are asked for and kept; otherwise they are encoded
            whenever they are asked for, with the same result.

    Raises:
        ConfigError: The folder cannot be made.
    """

    def __init__(self, folder: Path | None, base: BaseModel) -> None:
        self.folder = folder or Path(user_cache_dir("sdlora")) / "tensors"
        self.base = base
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"cache.dir: {self.folder} cannot be made ({error.strerror}). Choose a folder that you can write to."
            ) from error
        self.keeps_text = True
        self._masks: dict[Example, Tensor] = {}
        self._moment_keys: dict[Example, str] = {}
        self._keys: dict[Example, str] = {}
        self._text_keys: dict[str, str] = {}
        self._mapped: dict[str, TextEmbeddings] = {}

    def knows(self, example: Example) -> bool:
        """Whether an image was filled in this run."""
        return example in self._keys

    def moments(self, examples: Sequence[Example]) -> Tensor:
        """The VAE's posterior moments of filled images of one size, (B, 2C, h, w) float16 on the CPU."""
        return torch.stack([self._filled("moments", self._moment_keys[example])["moments"] for example in examples])

    def mask(self, example: Example) -> Tensor | None:
        """What counts of a filled image, (1, h, w) in [0, 1]; None if all of it does."""
        return self._masks.get(example)

    def identity(self, example: Example) -> str:
        """A hash of a filled image, its mask, its caption, and the VAE and text encoder that read them."""
        return content_key(self._keys[example], content_key("text", self.base.text_identity, example.caption))

    def text(self, captions: Sequence[str]) -> TextEmbeddings:
        """Text states of filled captions, or of any if text is not kept, the batch first, float32 on the CPU."""
        found = [self._text_of(caption) for caption in captions]
        return {name: torch.stack([states[name] for states in found]).float() for name in found[0]}

    def fill_moments(self, examples: Sequence[Example], background: str) -> Iterator[Progress]:
        """Encode the images that are not on disk yet.

        Args:
            examples: The images.
            background: The colour laid under transparent pixels.
        """
        for done, example in enumerate(examples, start=1):
            image = load_pixels(example, background)
            key = content_key("moments", self.base.vae_identity, pixel_hash(image))

            def encode(image: Image.Image = image) -> TextEmbeddings:
                return {"moments": self.base.encode_pixels(to_tensor(image).unsqueeze(0))[0]}

            tensors = self.fetch("moments", key, encode, torch.float16)
            if not bool(tensors["moments"].isfinite().all()):
                self._path("moments", key).unlink()
                raise DivergedError(
                    f"The base's VAE makes NaN or infinite numbers of {example.name}. Take the image out, or use a "
                    "VAE that is made for float16, too."
                )
            self._map(key, tensors)
            self._keys[example] = self._moment_keys[example] = key
            # Made anew every time: reading a mask is all the work there is.
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

            self._map(key, self.fetch("text", key, partial(self._encode, caption), torch.float16))
            self._text_keys[caption] = key
            yield Progress("cache captions", done, len(wanted))

    def text_bytes(self, num_captions: int) -> int:
        """How much disk, and memory, so many captions take."""
        return num_captions * sum(value.nbytes for value in self._encoded("").values())

    def _encode(self, caption: str) -> TextEmbeddings:
        # One at a time: the states of a caption must not depend on what it was encoded with.
        return {name: value[0] for name, value in self.base.encode_captions([caption]).items()}

    def _encoded(self, caption: str) -> TextEmbeddings:
        return _as_kept(partial(self._encode, caption), torch.float16)

    def holds(self, kind: str, key: str) -> bool:
        """Whether something is kept under a key."""
        return self._path(kind, key).exists()

    def fetch(
        self, kind: str, key: str, make: Callable[[], TextEmbeddings], dtype: torch.dtype = torch.float32
    ) -> TextEmbeddings:
        """What is kept under a key, made and kept if it is not there.

        Args:
            kind: The subfolder.
            key: From `content_key`, of everything that the tensors follow from.
            make: Makes named tensors.
            dtype: What they are kept in.

        Returns:
            The tensors as they lie in the file, mapped and not read.
        """
        path = self._path(kind, key)
        if path.exists():
            try:
                return load_file(path)
            except (SafetensorError, OSError):
                path.unlink(missing_ok=True)  # torn by a crash of the machine: made anew below
        with atomic_path(path) as temporary:
            save_file(_as_kept(make, dtype), temporary)
        return load_file(path)

    def _text_of(self, caption: str) -> TextEmbeddings:
        return self._filled("text", self._text_keys[caption]) if self.keeps_text else self._encoded(caption)

    def _map(self, key: str, tensors: TextEmbeddings) -> None:
        """Hold mapped tensors while there may be more maps; the rest is mapped whenever it is asked for."""
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
                f"{self._path(kind, key)} was in the cache and is gone or broken now ({error}). Start again with "
                "--resume, which makes it anew, and let nothing delete the cache meanwhile."
            ) from error

    def _path(self, kind: str, key: str) -> Path:
        return self.folder / kind / key[:2] / f"{key}.safetensors"


@torch.no_grad()
def _as_kept(make: Callable[[], TextEmbeddings], dtype: torch.dtype) -> TextEmbeddings:
    """Tensors as they come back from the disk, so that it makes no difference whether they were there."""
    return {name: value.to(dtype).cpu().contiguous() for name, value in make().items()}


def content_key(*parts: str) -> str:
    """A hash of texts, in their order, for file names."""
    return hashlib.blake2b("\x1f".join([_FORMAT, *parts]).encode("utf-8"), digest_size=20).hexdigest()
