"""Networks beside the scores that need none: SSCD detects copies and DINOv2 measures concept fidelity, if asked for.

Used by the check where `copycheck.sscd` or `copycheck.dinov2` is on. Their files are downloaded once and accepted only
if their SHA-256 matches the published ones. DINOv2 gives any two images of one subject a high similarity, so it cannot
detect copies.
Shapes: B batch, P images, G images of the gallery, D elements of an embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor
from transformers import Dinov2Model

# transformers downloads with httpx and does not wrap its connection errors.
from transformers.utils.hub import cached_file, httpx, is_offline_mode

from sdlora.common.files import sha256
from sdlora.copycheck.features import Features
from sdlora.copycheck.similarity import hp_ms, phash
from sdlora.errors import EmbedderError

# ImageNet's statistics, with which both networks were trained.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
_BATCH = 8


@dataclass(frozen=True)
class Published:
    """A network's files as its authors published them.

    Attributes:
        option: The option that enables it.
        source: A hub repository, or a folder with the files.
        revision: The commit on the hub.
        sha256: File name to SHA-256, in hexadecimal.
    """

    name: str
    option: str
    source: str
    revision: str
    sha256: Mapping[str, str]


DINOV2 = Published(
    "DINOv2",
    "copycheck.dinov2",
    "facebook/dinov2-small",
    "ed25f3a31f01632728cabb09d1542f84ab7b0056",
    {
        "config.json": "1809f83e3bdb1609a501a610ad4a742f4fd8ae44d72ca4aa0df52d1f2ac8628d",
        "model.safetensors": "ae1e99fcefd534ed978cdeb8326f08030c96e28b7a81ffcbc98a857c84d14be1",
    },
)
# The authors publish neither safetensors nor on the hub; the repository is a third party's. TorchScript is code, so it
# runs only if its hash is that of the authors' own file.
SSCD = Published(
    "SSCD",
    "copycheck.sscd",
    "m3/sscd-copy-detection",
    "8e8cbdcc1f6d7cc2455eb0b9812f5ec878dc3a3f",
    {"sscd_disc_mixup.torchscript.pt": "9f26bd4c848cc19b73d2ae92eea6e04886f61a7b764ceb7a13aeee62e6a6db56"},
)


@dataclass(frozen=True)
class Embedder:
    """A frozen network that turns images into embeddings, from `load_dinov2` or `load_sscd`.

    Attributes:
        network: Maps normalised pixels, (B, 3, H, W), to (B, D).
        prepare: Resizes and crops an RGB image to the network's input size.
        device: The network's.
    """

    network: Callable[[Tensor], Tensor]
    prepare: Callable[[Image.Image], Image.Image]
    device: torch.device

    @torch.no_grad()
    def embed(self, images: Sequence[Image.Image]) -> Tensor:
        """Normalised embeddings, (P, D) float32 on the CPU, of images of any mode and size.

        Raises:
            ValueError: There are no images.
        """
        if not images:
            raise ValueError("No images to embed; at least one is needed.")
        return torch.cat([self._batch(images[i : i + _BATCH]) for i in range(0, len(images), _BATCH)])

    def _batch(self, images: Sequence[Image.Image]) -> Tensor:
        pixels = np.stack([np.asarray(self.prepare(p.convert("RGB")), dtype=np.float32) / 255 for p in images])
        normalised = (torch.from_numpy(pixels) - torch.tensor(MEAN)) / torch.tensor(STD)
        embeddings = self.network(normalised.permute(0, 3, 1, 2).contiguous().to(self.device))
        return F.normalize(embeddings.float().cpu(), dim=1)


def concept_fidelity(embedder: Embedder, previews: Sequence[Image.Image], references: Sequence[Image.Image]) -> float:
    """How well previews show a concept: the mean cosine similarity of DINOv2 embeddings to images of it, in [-1, 1].

    Source: Ruiz et al. 2208.12242, section 4.1 (the metric "DINO", with DINOv2 for DINO).
    """
    return float((embedder.embed(previews) @ embedder.embed(references).T).mean())


def copy_cosines(embedder: Embedder, images: Sequence[Image.Image], gallery: Sequence[Image.Image]) -> Tensor:
    """SSCD similarity of every image, or its mirror image, to every image of a gallery.

    The threshold for a copy depends on the set of images (0.75 has 90 % precision on the authors' own), so compare
    it with the set's scale: see `sdlora.copycheck.scale`.

    Returns:
        (P, G) float32 in [-1, 1].

    Source: Pizzi et al. 2202.10261.
    """
    known = embedder.embed(gallery)
    seen, mirrored = embedder.embed(images), embedder.embed([ImageOps.mirror(p) for p in images])
    return torch.maximum(seen @ known.T, mirrored @ known.T)


@dataclass(frozen=True)
class Embedders:
    """The networks in use: SSCD and the base model's UNet each add a score, DINOv2 measures concept fidelity."""

    sscd: Embedder | None = None
    dinov2: Embedder | None = None
    features: Features | None = None

    @property
    def score_names(self) -> tuple[str, ...]:
        """The names of the similarity scores, in their order."""
        further = {"sscd": self.sscd, "features": self.features}
        return ("hp_ms", "phash", *(name for name, network in further.items() if network is not None))

    def scores(self, images: Sequence[Image.Image], gallery: Sequence[Image.Image]) -> Tensor:
        """Every score of every image against every image of a gallery, (P, G, S); 1 is a copy."""
        scores = [hp_ms(images, gallery), phash(images, gallery)]
        if self.sscd is not None:
            scores.append(copy_cosines(self.sscd, images, gallery))
        if self.features is not None:
            scores.append(self.features.similarity(images, gallery))
        return torch.stack(scores, dim=-1)


def load_embedders(*, sscd: bool, dinov2: bool, device: torch.device) -> tuple[Embedders, list[str]]:
    """Load the networks that are enabled; returns those that could be, and a message for each that could not."""
    found: dict[str, Embedder] = {}
    missing: list[str] = []
    for name, wanted, load in (("sscd", sscd, load_sscd), ("dinov2", dinov2, load_dinov2)):
        try:
            if wanted:
                found[name] = load(device=device)
        except EmbedderError as error:
            missing.append(str(error))
    return Embedders(found.get("sscd"), found.get("dinov2")), missing


def load_dinov2(published: Published = DINOV2, *, device: torch.device) -> Embedder:
    """Load DINOv2; its embedding is the class token of the last layer.

    Raises:
        EmbedderError: The files could not be downloaded, or are not the published ones.

    Source: Oquab et al. 2304.07193.
    """
    folder = _download(published)[0].parent
    model, report = Dinov2Model.from_pretrained(folder, use_safetensors=True, output_loading_info=True)
    # Parameter names change between versions, and missing parameters would be initialised at random.
    if report["missing_keys"]:
        raise _unavailable(published, f"{len(report['missing_keys'])} parameters are missing from its file")
    model.to(device).eval()
    return Embedder(lambda pixels: model(pixels).pooler_output, _dinov2_input, device)


def load_sscd(published: Published = SSCD, *, device: torch.device) -> Embedder:
    """Load SSCD's ResNet-50 "disc_mixup", the model its authors recommend.

    Raises:
        EmbedderError: The file could not be downloaded, is not the published one, or PyTorch cannot load it.

    Source: Pizzi et al. 2202.10261.
    """
    (file,) = _download(published)
    try:
        model = torch.jit.load(str(file), map_location=device).eval()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        raise _unavailable(published, f"PyTorch {torch.__version__} cannot load {file.name}") from error
    # Resized to a square, as its authors recommend, so that images of any shape form one batch.
    return Embedder(model, lambda image: image.resize((320, 320), Image.Resampling.BILINEAR), device)


def _dinov2_input(image: Image.Image) -> Image.Image:
    """Short edge resized to 256 px, then a centre crop of 224 x 224, as in its published processor."""
    short = min(image.size)
    size = (int(256 * image.width / short), int(256 * image.height / short))
    left, top = (size[0] - 224) // 2, (size[1] - 224) // 2
    return image.resize(size, Image.Resampling.BICUBIC).crop((left, top, left + 224, top + 224))


def _download(published: Published) -> list[Path]:
    """The files, from the folder, the hub's cache or the hub."""
    found = []
    for name, expected in published.sha256.items():
        try:
            path = cached_file(published.source, name, revision=published.revision)
        except (OSError, httpx.HTTPError) as error:
            if is_offline_mode() and not Path(published.source).is_dir():
                reason = "HF_HUB_OFFLINE is set and the files are not in the cache"
            else:
                reason = next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".:")
            raise _unavailable(published, reason) from error
        if path is None:
            raise _unavailable(published, f"{name} does not exist there")
        if sha256(Path(path)) != expected:
            raise _unavailable(published, f"the SHA-256 of {path} is not that of the published file; delete it")
        found.append(Path(path))
    return found


def _unavailable(published: Published, reason: str) -> EmbedderError:
    return EmbedderError(
        f"{published.option} is on, but {published.name} could not be loaded from {published.source}: {reason}. "
        "Continuing without it. Allow the download once, or turn the option off."
    )
