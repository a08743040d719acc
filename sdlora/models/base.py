"""What training, caching and previews need of a base model.

A new family is one new file with a subclass of `BaseModel`, and a line in `sdlora.common.families` and
`sdlora.models.families`; those with a UNet share `sdlora.models.unet`.
Shapes: B batch, C latent channels, H/W pixels, h/w latents.
"""

from __future__ import annotations

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar, Literal

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from PIL import Image
from torch import Tensor, nn

from sdlora.data.dataset import Example
from sdlora.diffusion.noise import NoiseLevels
from sdlora.lora.block_offload import BlockOffload
from sdlora.lora.quantize import num_weights
from sdlora.lora.timestep_rank import Told
from sdlora.models.architectures import FamilyNames
from sdlora.models.casts import cast_inputs, mapped
from sdlora.models.identity import weights_identity

# References to other files in ComfyUI and A1111, which remove them from a prompt before encoding it.
_CALLS = re.compile(r"embedding:\S+|<(?:lora|lyco|hypernet):[^>]*>", re.IGNORECASE)

TextEmbeddings = dict[str, Tensor]
"""What the network is conditioned on, beside the timestep: named tensors, batch first."""
_MOST_IN_FLOAT32 = 3_000_000_000
_ASIDE = torch.device("cpu")
"""Where networks are kept while they are not in use."""


@dataclass(frozen=True)
class TextOptions:
    """How captions are read."""

    clip_skip: int | None = None  # the layer to read, counted from the last (1); None for the family's own
    max_windows: int = 1  # how many windows of 75 tokens a caption may fill


def references_to_other_files(caption: str) -> list[str]:
    """References to textual inversions and other networks in a caption, which are not words."""
    return _CALLS.findall(caption)


@dataclass(frozen=True)
class Source:
    """A loaded pipeline and where it came from."""

    pipeline: DiffusionPipeline  # on the CPU, with the network in float32 or the compute dtype
    path: str  # as the user gave it
    revision: str | None  # the commit on the hub, or None
    reload: Callable[..., DiffusionPipeline]  # loads it again, given the network's dtype and the components to keep


class BaseModel(ABC):
    """A frozen base model: encoders for images and captions, and the network that adapters train.

    Args:
        source: The loaded pipeline.
        device: Where to compute.
        dtype: The frozen network's dtype. The VAE stays in float32: it is small, and that of Stable Diffusion XL
            overflows in float16.
        text: How captions are read.
        offload: Keep blocks on the host between their uses; see `sdlora.lora.block_offload`.

    Attributes:
        names: What the family is called.
        architecture: ModelSpec's name of the model, such as "stable-diffusion-v1".
        network_name: What diffusers calls the network in its pipeline.
        network_class: The network's class in diffusers.
        text_parts: What diffusers calls its text encoders.
        optional_parts: Arguments that make its pipeline load without parts that are not needed.
        default_targets: The targets of an estimate that names none.
        path: Where it was loaded from, as the user gave it.
        revision: The commit that a hub id was resolved to, or None.
        network: What adapters are injected into, in the compute dtype.
        text_encoders: The networks that encode captions, on whichever device they are; to count and name.
        device: Where the network is. The VAE and the text encoders are there only while they are in use.
        levels: What a timestep means, and what the network predicts.
        prediction_type: What it predicts: "epsilon", "v_prediction" or "flow".
        resolution_px: The edge length that it was trained at, in pixels.
        latent_factor: Pixels per latent along one edge.
        size_step_px: Widths and heights of images are multiples of this.
        max_tokens: How many tokens of a caption are read, start and end tokens included.
        text_dtype: In which the cache keeps text embeddings.
        trains_text: Whether the text encoders can have adapters.
        keeps_text_type: Whether text encoders stay in the type of their files, as language models of billions of
            weights do; others are in float32.
        reads_windows: Whether captions are read in CLIP's windows of 75 tokens.
        network_waits: Whether the network leaves the device while a text encoder is there: a language model takes as
            much memory as the network itself.
        packed_blocks: What the paths of linear layers that can be packed contain; see `sdlora.lora.quantize`.
        told: What the network is told of a timestep.
        block_lists: What the module lists are called that hold the network's blocks.
        text_block_lists: The same, of a language model that reads captions.
        samplers: The samplers that previews can be drawn with; see `sdlora.previews.sampler`.
        few_steps: The denoising steps of its distilled sibling, which can draw previews; None without one.
        log_shift: What the family's shift of noise levels adds to their logits at its own resolution, 0 for none; see
            `sdlora.diffusion.flow`.
        vae_identity: A hash of the VAE's weights and configuration, for cache keys.
        text_identity: A hash of the tokenizer and the text encoders, for cache keys.
        scheduler_settings: The configuration that its scheduler was loaded with, as JSON values.

    Raises:
        BaseModelError: The network is not of the family, or its noise schedule is unsupported.
        ConfigError: The family cannot read captions as `text` asks.
    """

    names: ClassVar[FamilyNames]
    architecture: str
    network_name: ClassVar[str]
    network_class: ClassVar[str]
    text_parts: ClassVar[tuple[str, ...]] = ("text_encoder",)
    optional_parts: ClassVar[Mapping[str, Any]] = {}
    default_targets: ClassVar[tuple[str, ...]]
    keeps_text_type: ClassVar[bool] = False
    reads_windows: ClassVar[bool] = False
    text_dtype: ClassVar[torch.dtype] = torch.float16
    trains_text: ClassVar[bool] = True
    network_waits: ClassVar[bool] = False
    packed_blocks: ClassVar[str]
    block_lists: ClassVar[tuple[str, ...]]
    text_block_lists: ClassVar[tuple[str, ...]] = ("layers",)
    told: ClassVar[Told] = "timestep"
    samplers: ClassVar[tuple[str, ...]]
    few_steps: ClassVar[int | None] = None
    log_shift: float = 0.0
    levels: NoiseLevels
    prediction_type: Literal["epsilon", "v_prediction", "flow"]
    resolution_px: int
    latent_factor: int
    max_tokens: int
    size_step_px: int = 1

    def __init__(
        self, source: Source, *, device: torch.device, dtype: torch.dtype, text: TextOptions, offload: bool = False
    ) -> None:
        self._pipeline = pipeline = source.pipeline
        self._reload = source.reload
        self.path, self.revision, self.device, self.text = source.path, source.revision, device, text
        self.network: Any = getattr(pipeline, self.network_name)
        self.vae: AutoencoderKL = pipeline.vae
        self.text_encoders: tuple[Any, ...] = one_or_two(pipeline, "text_encoder")
        self.tokenizers: tuple[Any, ...] = one_or_two(pipeline, "tokenizer")
        own = {key: value for key, value in dict(pipeline.scheduler.config).items() if not key.startswith("_")}
        self.scheduler_settings: dict[str, Any] = json.loads(json.dumps(own, default=str))
        self._set_up(pipeline)
        self.vae_identity = weights_identity(self.vae, self.vae.config)
        parts = [
            weights_identity(e, e.config.to_dict(), tokenizer.get_vocab(), {"padding": tokenizer.pad_token_id})
            for e, tokenizer in zip(self.text_encoders, self.tokenizers, strict=True)
        ]
        self.text_identity = hashlib.blake2b("".join([*parts, str(text)]).encode("utf-8"), digest_size=16).hexdigest()
        for module in (self.network, self.vae, *self.text_encoders):
            module.requires_grad_(False).eval()
        self.offloaded: dict[nn.Module, BlockOffload] = {}
        if offload:
            self.network.to(_ASIDE, dtype)
            readers = self.text_encoders if self.keeps_text_type else ()
            lists = {self.network: self.block_lists} | dict.fromkeys(readers, self.text_block_lists)
            self.offloaded = {module: BlockOffload(module, names, device) for module, names in lists.items()}
            self._move(self.network, device)
        else:
            self.network.to(device, dtype)
        self._dtype = dtype

    @abstractmethod
    def _set_up(self, pipeline: DiffusionPipeline) -> None:
        """Set the attributes that are the family's own, after refusing what its file cannot train or read."""

    def move_text_encoders(self) -> tuple[Any, ...]:
        """The text encoders, moved to the device, where encoding and training their adapters need them."""
        self._use(*self.text_encoders)
        return self.text_encoders

    @torch.no_grad()
    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] to posterior moments (B, 2C, h, w) in float32: the mean, then the log-variance."""
        self._use(self.vae)
        moments: Tensor = self.vae.encode(pixels.to(self.device)).latent_dist.parameters
        return moments

    def sample_latents(self, moments: Tensor, noise: Tensor) -> Tensor:
        """Scaled latents (B, C, h, w): (mean + exp(log-variance / 2) * noise - shift_factor) * scaling_factor.

        Args:
            moments: As `encode_pixels` returns them.
            noise: Standard normal, (B, C, h, w).
        """
        mean, log_variance = moments.float().chunk(2, dim=1)
        # diffusers clamps the log-variance to this range as well (DiagonalGaussianDistribution).
        deviation = torch.exp(0.5 * log_variance.clamp(-30.0, 20.0))
        latents = mean + deviation * noise
        if (shift := self.vae.config.shift_factor) is not None:
            latents = latents - shift
        scaled: Tensor = latents * self.vae.config.scaling_factor
        return scaled

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> list[Image.Image]:
        """The images of scaled latents, (B, C, h, w), as `sample_latents` returns them."""
        self._use(self.vae)
        latents = latents.to(self.device) / self.vae.config.scaling_factor
        if (shift := self.vae.config.shift_factor) is not None:
            latents = latents + shift
        pixels = self.vae.decode(latents, return_dict=False)[0]
        images: list[Image.Image] = self._pipeline.image_processor.postprocess(pixels.float(), output_type="pil")
        return images

    @abstractmethod
    def encode_captions(self, captions: Sequence[str]) -> TextEmbeddings:
        """Captions to the text embeddings that `predict` takes; gradients reach a text encoder's adapter."""

    def batched(self, embeddings: Sequence[TextEmbeddings]) -> TextEmbeddings:
        """Text embeddings of single captions, without a batch, as those of a batch in float32."""
        return {name: torch.stack([own[name] for own in embeddings]).float() for name in embeddings[0]}

    def log_shift_at(self, size_px: tuple[int, int]) -> float:
        """`log_shift` for images of a width and a height in pixels, in families where it depends on them."""
        return self.log_shift

    def size_conditions(self, examples: Sequence[Example]) -> TextEmbeddings:
        """Further conditioning of `predict` that depends on each image's size and crop alone; none by default."""
        return {}

    @abstractmethod
    def prompt_embeddings(self, prompts: Sequence[str], negative_prompts: Sequence[str]) -> dict[str, Any]:
        """Keyword arguments for the pipeline in place of prompts, encoded as captions are."""

    @abstractmethod
    def num_tokens(self, caption: str) -> int:
        """How many tokens a caption has, start and end tokens included."""

    def predict(self, noisy: Tensor, timesteps: Tensor, text: TextEmbeddings) -> Tensor:
        """The network's prediction (B, C, h, w) in float32, for noisy latents (B, C, h, w) at timesteps (B,)."""
        if self.network_waits:
            self._use()
        return self.denoise(self.network, noisy, timesteps, text)

    @staticmethod
    @abstractmethod
    def denoise(network: Any, noisy: Tensor, timesteps: Tensor, text: TextEmbeddings) -> Tensor:
        """What `predict` returns, by a network of the family on any device."""

    @abstractmethod
    def use_zero_terminal_snr(self) -> None:
        """Rescale the schedule to zero terminal SNR, for training and for previews.

        Raises:
            ConfigError: That means nothing for this base model.
        """

    @staticmethod
    @abstractmethod
    def probe(network: nn.Module) -> list[Tensor]:
        """The network's predictions for fixed inputs, with which a file is verified."""

    @classmethod
    def fits(cls, config: Mapping[str, Any]) -> bool:
        """Whether a network of `network_class` is of this family, where several families share that class."""
        return True

    @classmethod
    def is_distilled(cls, path: str, index: Mapping[str, Any]) -> bool:
        """Whether a base model of this class is distilled to draw in a few steps, by its name and index or metadata."""
        return False

    @classmethod
    def file_config(cls, tensors: Mapping[str, tuple[int, ...]]) -> Mapping[str, Any] | None:
        """The network's configuration by the shapes in a file that holds it alone; None if it is not of this class."""
        return None

    @classmethod
    @abstractmethod
    def true_configs(cls) -> tuple[Mapping[str, Any], Mapping[str, Any], tuple[Mapping[str, Any], ...]]:
        """The configurations of its network, its VAE and its text encoders, as published."""

    @staticmethod
    @abstractmethod
    def empty_text_encoder(config: Mapping[str, Any]) -> nn.Module:
        """A text encoder without weights, on the device of the context."""

    @staticmethod
    @abstractmethod
    def empty_text(network: Any, text_configs: Sequence[Mapping[str, Any]], batch_size: int) -> TextEmbeddings:
        """Text embeddings without values of captions of usual length, on the device of the context."""

    @staticmethod
    @abstractmethod
    def empty_levels() -> NoiseLevels:
        """The family's noise levels without values, on the device of the context."""

    @staticmethod
    def latent_shape(network: Mapping[str, Any], vae: Mapping[str, Any]) -> tuple[int, int]:
        """C, and pixels per latent along one edge, by the configurations of network and VAE."""
        return int(network.get("in_channels", 4)), int(2 ** (len(vae["block_out_channels"]) - 1))

    def guidance_argument(self, scale: float) -> float:
        """A classifier-free guidance scale, 1 being none, in the terms of the family's pipeline."""
        return scale

    @contextmanager
    def pipeline(self) -> Iterator[DiffusionPipeline]:
        """A pipeline around these networks, adapters included; latents stay in float32 whatever the network's dtype.

        It takes the arguments that `prompt_embeddings` returns and has no text encoders of its own.
        """
        self._use(self.vae)
        # diffusers computes on the device of the first network it finds, and reads only these of a text encoder.
        held = vars(self._pipeline)
        encoders = {name: held[name] for name in ("text_encoder", "text_encoder_2") if name in held}
        stand_ins = {name: SimpleNamespace(dtype=e.dtype, config=e.config) for name, e in encoders.items()}
        before = self.network.register_forward_pre_hook(cast_inputs, with_kwargs=True)
        after = self.network.register_forward_hook(lambda _, __, output: tuple(mapped(Tensor.float, x) for x in output))
        held.update(stand_ins)
        try:
            yield self._pipeline
        finally:
            held.update(encoders)
            before.remove()
            after.remove()

    @contextmanager
    def drawn_by(self, network: Any, scheduler: Any, blocks: BlockOffload | None) -> Iterator[None]:
        """Draw by another network of the same shape inside the block; this one waits aside.

        Args:
            network: On the CPU, as it is again afterwards.
            scheduler: None for the base model's own.
            blocks: Keeps the network's blocks on the host, where this one's are.
        """
        own, held = self.network, vars(self._pipeline)
        before = {self.network_name: held[self.network_name], "scheduler": held["scheduler"]}
        self._move(own, _ASIDE)
        self.network = network
        self.offloaded |= {} if blocks is None else {network: blocks}
        held.update({self.network_name: network, "scheduler": scheduler or before["scheduler"]})
        try:
            yield
        finally:
            self._move(network, _ASIDE)
            self.offloaded.pop(network, None)
            self.network = own
            held.update(before)
            self._move(own, self.device)

    def offload(self) -> None:
        """Move VAE and text encoders off the device; the next use moves them back."""
        self._use()

    def _use(self, *wanted: nn.Module) -> None:
        """Move the wanted networks to the device, after moving the others off it.

        Trained adapters stay where they are, because the optimizer refers to them.
        """
        others = [network for network in (self.vae, *self.text_encoders) if network not in wanted]
        for network in others:
            if not _has_adapter(network):
                self._move(network, _ASIDE)
        if self.network_waits:
            reads = any(network in self.text_encoders for network in wanted)
            self._move(self.network, _ASIDE if reads else self.device)
        for network in wanted:
            self._move(network, self.device)

    def _move(self, network: nn.Module, device: torch.device) -> None:
        if network in self.offloaded:
            self.offloaded[network].move(device)
        else:
            move(network, device)

    def fresh_pipeline(self) -> DiffusionPipeline:
        """The base model on the CPU without adapters, its network in `proof_dtype`; what has none is kept."""
        held = {name: getattr(self._pipeline, name, None) for name in ("vae", "text_encoder", "text_encoder_2")}
        plain = {name: network for name, network in held.items() if network is not None and not _has_adapter(network)}
        for network in plain.values():
            self._move(network, torch.device("cpu"))
        return self._reload(proof_dtype(num_weights(self.network), self._dtype), **plain)


def proof_dtype(num_parameters: int, dtype: torch.dtype) -> torch.dtype:
    """The type in which a base is loaded again to verify files: float32, or its compute type if it is large."""
    return torch.float32 if num_parameters <= _MOST_IN_FLOAT32 else dtype


def _has_adapter(network: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in network.parameters())


def move(network: nn.Module, device: torch.device) -> None:
    """Move a network to a device unless it is there; what is trained stays, because the optimizer refers to it."""
    frozen = next((parameter for parameter in network.parameters() if not parameter.requires_grad), None)
    if frozen is None or not _has_adapter(network):
        if next(network.parameters()).device != device:
            network.to(device)
    elif frozen.device != device:
        network._apply(lambda x: x if x.requires_grad else x.to(device))  # type: ignore[no-untyped-call]


def one_or_two(pipeline: DiffusionPipeline, part: str) -> Any:
    """A component of a pipeline, and the second of its kind if there is one."""
    found = (getattr(pipeline, name, None) for name in (part, f"{part}_2"))
    return tuple(component for component in found if component is not None)
