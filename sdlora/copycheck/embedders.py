"""Two networks as arbiters, off unless asked for: DINOv2 of how well the concept is met, SSCD of copies.

Neither comes with sdlora: their files are fetched from the hub once, and used only if they are, byte for
byte, the published ones. DINOv2 finds any two images of one subject alike, so it says nothing of copies.
Shapes: B batch, P images, G images of the gallery, D numbers of an embedding.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor
from transformers import Dinov2Model

# httpx is what transformers asks the hub with; when a connection breaks off, its error comes through as it is.
from transformers.utils.hub import cached_file, httpx, is_offline_mode

from sdlora.copycheck.similarity import hp_ms, phash
from sdlora.errors import ArbiterError

# ImageNet's, which both networks were trained with.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
_BATCH = 8


@dataclass(frozen=True)
class Published:
    """A network's files as its authors published them.

    Attributes:
        name: What people call it.
        option: The option that asks for it.
        source: A hub id, or a folder with the files.
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
# The authors publish no safetensors and nothing on the hub: this is a copy there by someone else. The hash is that of
# the authors' own file, without which TorchScript, being a program, would not be run.
SSCD = Published(
    "SSCD",
    "copycheck.sscd",
    "m3/sscd-copy-detection",
    "8e8cbdcc1f6d7cc2455eb0b9812f5ec878dc3a3f",
    {"sscd_disc_mixup.torchscript.pt": "9f26bd4c848cc19b73d2ae92eea6e04886f61a7b764ceb7a13aeee62e6a6db56"},
)


class Arbiter:
    """A frozen network that turns images into embeddings; made by `load_dinov2` and `load_sscd`.

    Args:
        network: (B, 3, H, W) of normalised pixels to (B, D).
        prepare: An image in RGB as the network was trained to see it, all of one size.
        device: Where the network is.
    """

    def __init__(
        self, network: Callable[[Tensor], Tensor], prepare: Callable[[Image.Image], Image.Image], device: torch.device
    ) -> None:
        self._network = network
        self._prepare = prepare
        self._device = device

    @torch.no_grad()
    def embed(self, images: Sequence[Image.Image]) -> Tensor:
        """Embeddings of length 1, (P, D) float32 on the CPU, for images of any mode and size.

        Raises:
            ValueError: There are no images.
        """
        if not images:
            raise ValueError("An arbiter needs at least one image.")
        return torch.cat([self._batch(images[i : i + _BATCH]) for i in range(0, len(images), _BATCH)])

    def _batch(self, images: Sequence[Image.Image]) -> Tensor:
        pixels = np.stack([np.asarray(self._prepare(p.convert("RGB")), dtype=np.float32) / 255 for p in images])
        normalised = (torch.from_numpy(pixels) - torch.tensor(MEAN)) / torch.tensor(STD)
        embeddings = self._network(normalised.permute(0, 3, 1, 2).contiguous().to(self._device))
        return F.normalize(embeddings.float().cpu(), dim=1)


def concept_fidelity(arbiter: Arbiter, previews: Sequence[Image.Image], references: Sequence[Image.Image]) -> float:
    """How well previews meet a concept: the mean cosine between them and images of it, in [-1, 1].

    Args:
        arbiter: DINOv2.
        previews: At least one.
        references: Images of the concept, at least one.

    Source: Ruiz et al. 2208.12242, section 4.1 (the metric "DINO", with DINOv2 for DINO).
    """
    return float((arbiter.embed(previews) @ arbiter.embed(references).T).mean())


def copy_cosines(arbiter: Arbiter, images: Sequence[Image.Image], gallery: Sequence[Image.Image]) -> Tensor:
    """How much every image looks like a copy of every image of a gallery, or of its mirror image.

    A cosine means another thing in every set of images (0.75 is a copy in nine cases of ten on the authors' own), so
    it is to be held against a null: see `sdlora.copycheck.statistics.p_values`.

    Args:
        arbiter: SSCD.
        images: P images, at least one.
        gallery: G images they may be copies of, at least one.

    Returns:
        (P, G) float32 in [-1, 1].

    Source: Pizzi et al. 2202.10261.
    """
    known = arbiter.embed(gallery)
    seen, mirrored = arbiter.embed(images), arbiter.embed([ImageOps.mirror(p) for p in images])
    return torch.maximum(seen @ known.T, mirrored @ known.T)


@dataclass(frozen=True)
class Arbiters:
    """The networks that were asked for and could be had.

    Attributes:
        sscd: Gives one more score of similarity.
        dinov2: Tells how well the concept is met.
    """

    sscd: Arbiter | None = None
    dinov2: Arbiter | None = None

    @property
    def score_names(self) -> tuple[str, ...]:
        """The scores of similarity, in their order."""
        return ("hp_ms", "phash") if self.sscd is None else ("hp_ms", "phash", "sscd")

    def scores(self, images: Sequence[Image.Image], gallery: Sequence[Image.Image]) -> Tensor:
        """Every score of every image against every image of a gallery, (P, G, S); 1 is a copy."""
        scores = [hp_ms(images, gallery), phash(images, gallery)]
        if self.sscd is not None:
            scores.append(copy_cosines(self.sscd, images, gallery))
        return torch.stack(scores, dim=-1)


def load_arbiters(*, sscd: bool, dinov2: bool, device: torch.device) -> tuple[Arbiters, list[str]]:
    """Load the networks that are asked for.

    Returns:
        Those that could be had, and a sentence for each that could not.
    """
    found: dict[str, Arbiter] = {}
    missing: list[str] = []
    for name, wanted, load in (("sscd", sscd, load_sscd), ("dinov2", dinov2, load_dinov2)):
        try:
            if wanted:
                found[name] = load(device=device)
        except ArbiterError as error:
            missing.append(str(error))
    return Arbiters(**found), missing


def load_dinov2(published: Published = DINOV2, *, device: torch.device) -> Arbiter:
    """DINOv2, whose embedding is the class token of the last layer.

    Args:
        published: Where its config.json and model.safetensors are.
        device: Where to compute.

    Raises:
        ArbiterError: The files are not to be had.

    Source: Oquab et al. 2304.07193.
    """
    folder = _fetch(published)[0].parent
    model, report = Dinov2Model.from_pretrained(folder, use_safetensors=True, output_loading_info=True)
    # Names change between versions, and what is missing would be random numbers.
    if report["missing_keys"]:
        raise _unavailable(published, f"{len(report['missing_keys'])} of its weights are not found in its file")
    model.to(device).eval()
    return Arbiter(lambda pixels: model(pixels).pooler_output, _as_dinov2_sees, device)


def load_sscd(published: Published = SSCD, *, device: torch.device) -> Arbiter:
    """SSCD's ResNet-50 "disc_mixup", which its authors recommend.

    Args:
        published: Where its TorchScript file is.
        device: Where to compute.

    Raises:
        ArbiterError: The file is not to be had, or this PyTorch does not load it.

    Source: Pizzi et al. 2202.10261.
    """
    (file,) = _fetch(published)
    try:
        model = torch.jit.load(str(file), map_location=device).eval()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        raise _unavailable(published, f"PyTorch {torch.__version__} does not load {file.name}") from error
    return Arbiter(model, _as_sscd_sees, device)


def _as_dinov2_sees(image: Image.Image) -> Image.Image:
    """The short edge to 256 px, and 224 x 224 from the middle, as its published processor does."""
    short = min(image.size)
    size = (int(256 * image.width / short), int(256 * image.height / short))
    left, top = (size[0] - 224) // 2, (size[1] - 224) // 2
    return image.resize(size, Image.Resampling.BICUBIC).crop((left, top, left + 224, top + 224))


def _as_sscd_sees(image: Image.Image) -> Image.Image:
    """Squeezed into a square, as its authors recommend, so that images of any shape go in one batch."""
    return image.resize((320, 320), Image.Resampling.BILINEAR)


def _fetch(published: Published) -> list[Path]:
    """The files, from the folder, from what was fetched before, or from the hub."""
    found = []
    for name, sha256 in published.sha256.items():
        try:
            path = cached_file(published.source, name, revision=published.revision)
        except (OSError, httpx.HTTPError) as error:
            raise _unavailable(published, _reason(error, published.source)) from error
        if path is None:
            raise _unavailable(published, f"there is no {name}")
        with Path(path).open("rb") as handle:
            if hashlib.file_digest(handle, "sha256").hexdigest() != sha256:
                raise _unavailable(published, f"{path} is not the file that was published; delete it")
        found.append(Path(path))
    return found


def _reason(error: Exception, source: str) -> str:
    if is_offline_mode() and not Path(source).is_dir():
        return "HF_HUB_OFFLINE is set, and they were not fetched before"
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".:")


def _unavailable(published: Published, reason: str) -> ArbiterError:
    return ArbiterError(
        f"{published.name} was asked for ({published.option}), but its files are not to be had from "
        f"{published.source}: {reason}. All else goes on without it. Let them be fetched once over the network, or "
        "turn the option off."
    )
