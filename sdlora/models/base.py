"""What training, caching and previews need of a base model, and how the families with a UNet provide it.

A new family is one new file with a subclass of `BaseModel`. Captions are read in windows of 77 tokens.
Shapes: B batch, C latent channels (4), H/W pixels, h/w latents, N windows, L tokens of all of them, D text width.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from types import SimpleNamespace
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, DiffusionPipeline, UNet2DConditionModel
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPTokenizer

from sdlora.data.dataset import Example
from sdlora.diffusion.noise import check_prediction_type, zero_terminal_snr
from sdlora.errors import BaseModelError, ConfigError

_MAX_TOKENS = 77
_START, _END = "<|startoftext|>", "<|endoftext|>"
# References to other files in ComfyUI and A1111, which remove them from a prompt before encoding it.
_CALLS = re.compile(r"embedding:\S+|<(?:lora|lyco|hypernet):[^>]*>", re.IGNORECASE)

TextEmbeddings = dict[str, Tensor]
"""What the network is conditioned on, beside the timestep: named tensors, batch first."""
_ASIDE = torch.device("cpu")
"""Where networks are kept while they are not in use."""


@dataclass(frozen=True)
class TextOptions:
    """How captions are read."""

    clip_skip: int | None = None  # the layer to read, counted from the last (1); None for the family's own
    max_windows: int = 1  # how many windows of 75 tokens a caption may fill


def tokens_in_windows(tokenizer: CLIPTokenizer, captions: Sequence[str], max_windows: int) -> Tensor:
    """Token ids (B, N, L); every window has its own start and end token, and longer captions are cut off.

    Unused windows hold the empty caption, so that the embeddings of all captions have one shape.
    """
    length = tokenizer.model_max_length
    size = length - 2
    found: list[list[list[int]]] = []
    for caption in captions:
        ids = tokenizer(caption, add_special_tokens=False, truncation=False, verbose=False).input_ids
        parts = [ids[first : first + size] for first in range(0, max_windows * size, size)]
        marked = [[tokenizer.bos_token_id, *part, tokenizer.eos_token_id] for part in parts]
        found.append([part + [tokenizer.pad_token_id] * (length - len(part)) for part in marked])
    return torch.tensor(found)


def references_to_other_files(caption: str) -> list[str]:
    """References to textual inversions and other networks in a caption, which are not words."""
    return _CALLS.findall(caption)


def clip_tokenizer(padding: Literal["<|endoftext|>", "!"]) -> CLIPTokenizer:
    """The tokenizer that OpenAI's and OpenCLIP's text encoders share, from the bundled merges.

    Args:
        padding: The padding token: the end token for OpenAI's encoder, "!" (token 0) for OpenCLIP's.

    Source: Radford et al. 2103.00020, section 2.4: byte-pair encoding, lower-cased, of 49,152 words and two special
    tokens.
    """
    packed = files("sdlora.models").joinpath("clip/merges.txt.gz").read_bytes()
    merges = [tuple(line.split()) for line in gzip.decompress(packed).decode("utf-8").splitlines()]
    # The 256 bytes as characters: printable ones unchanged, then the others, moved beyond them.
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = [chr(code) for code in (*printable, *range(256, 512 - len(printable)))]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in merges), _START, _END]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, pad_token=padding, model_max_length=_MAX_TOKENS)


@dataclass(frozen=True)
class Source:
    """A loaded pipeline and where it came from."""

    pipeline: DiffusionPipeline  # on the CPU, with the UNet in float32 or the compute dtype, everything else in float32
    path: str  # as the user gave it
    revision: str | None  # the commit on the hub, or None
    reload: Callable[..., DiffusionPipeline]  # loads it again, given the UNet's dtype and the components to keep


class BaseModel(ABC):
    """A frozen base model: encoders for images and captions, and the network that adapters train.

    Args:
        source: The loaded pipeline.
        device: Where to compute.
        dtype: The frozen UNet's dtype. VAE and text encoders stay in float32: they are small or run once, and the
            VAE of Stable Diffusion XL overflows in float16.
        text: How captions are read.

    Attributes:
        architecture: ModelSpec's name of the family, such as "stable-diffusion-v1".
        path: Where it was loaded from, as the user gave it.
        revision: The commit that a hub id was resolved to, or None.
        unet: The network that adapters are injected into, in the compute dtype.
        text_encoders: The networks that encode captions, in float32, on whichever device they are; to count and name.
        device: Where the UNet is. The VAE and the text encoders are there only while they are in use.
        prediction_type: "epsilon" or "v_prediction".
        alphas_cumprod: The noise schedule, (1000,) float32 on `device`.
        resolution_px: The edge length that it was trained at, in pixels.
        latent_factor: Pixels per latent along one edge.
        max_tokens: How many tokens of a caption are read, start and end tokens included.
        vae_identity: A hash of the VAE's weights and configuration, for cache keys.
        text_identity: A hash of the tokenizer and the text encoders, for cache keys.

    Raises:
        BaseModelError: The UNet needs inputs that the family does not have, or the prediction type or noise schedule
            is unsupported.
        ConfigError: The family cannot read captions as `text` asks.
    """

    architecture: str

    def __init__(self, source: Source, *, device: torch.device, dtype: torch.dtype, text: TextOptions) -> None:
        self._pipeline = pipeline = source.pipeline
        self._reload = source.reload
        self.path, self.revision, self.device, self.text = source.path, source.revision, device, text
        self.unet: UNet2DConditionModel = pipeline.unet
        self.vae: AutoencoderKL = pipeline.vae
        self.text_encoders: tuple[Any, ...] = _one_or_two(pipeline, "text_encoder")
        self.tokenizers: tuple[CLIPTokenizer, ...] = _one_or_two(pipeline, "tokenizer")
        self._refuse_other_inputs()
        self._check_family(pipeline)
        if "beta_schedule" not in pipeline.scheduler.config:
            raise BaseModelError(
                f"{source.path!r} uses {type(pipeline.scheduler).__name__}, whose noise schedule sdlora does not "
                "train. Choose a base model with a DDPM schedule."
            )
        schedule = DDPMScheduler.from_config(pipeline.scheduler.config)
        self.prediction_type = check_prediction_type(schedule.config.prediction_type)
        self.alphas_cumprod: Tensor = schedule.alphas_cumprod.float().to(device)
        self.latent_factor: int = 2 ** (len(self.vae.config.block_out_channels) - 1)
        self.resolution_px: int = self.unet.config.sample_size * self.latent_factor
        self.max_tokens: int = text.max_windows * (self.tokenizers[0].model_max_length - 2) + 2
        self.vae_identity = weights_identity(self.vae, self.vae.config)
        parts = [
            weights_identity(e, e.config.to_dict(), tokenizer.get_vocab(), {"padding": tokenizer.pad_token_id})
            for e, tokenizer in zip(self.text_encoders, self.tokenizers, strict=True)
        ]
        self.text_identity = hashlib.blake2b("".join([*parts, str(text)]).encode("utf-8"), digest_size=16).hexdigest()
        for module in (self.unet, self.vae, *self.text_encoders):
            module.requires_grad_(False).eval()
        self.unet.to(device, dtype)

    def _refuse_other_inputs(self) -> None:
        """Refuse a UNet that is made for inpainting, depth, editing or image prompts."""
        unet = self.unet.config
        channels, own = unet.in_channels, self.vae.config.latent_channels
        if channels != own:
            kinds = {9: "an inpainting model", 5: "a depth model", 8: "a model that edits images"}
            kind = kinds.get(channels, "not a text-to-image model")
            raise BaseModelError(
                f"The UNet of {self.path!r} takes {channels} channels but its VAE has {own}: it is {kind}. "
                "Train on the base model that it was made from; the LoRA works on both."
            )
        if unet.class_embed_type is not None or unet.encoder_hid_dim_type is not None:
            raise BaseModelError(
                f"The UNet of {self.path!r} is conditioned on images (as unCLIP is), which sdlora does not train. "
                "Choose a text-to-image base model."
            )

    @abstractmethod
    def _check_family(self, pipeline: DiffusionPipeline) -> None:
        """Refuse what the family's file cannot train or read."""

    def _refuse_clip_skip(self, family: str) -> None:
        """Refuse any layer but the second to last, on which the family's UNet was trained."""
        if self.text.clip_skip not in (None, 2):
            raise ConfigError(
                f"base.clip_skip is {self.text.clip_skip}, but {family} always reads the second to last layer (2). "
                "Leave it unset."
            )

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
        """Scaled latents (B, C, h, w): (mean + exp(log-variance / 2) * noise) * scaling_factor.

        Args:
            moments: As `encode_pixels` returns them.
            noise: Standard normal, (B, C, h, w).
        """
        mean, log_variance = moments.float().chunk(2, dim=1)
        # diffusers clamps the log-variance to this range as well (DiagonalGaussianDistribution).
        deviation = torch.exp(0.5 * log_variance.clamp(-30.0, 20.0))
        latents: Tensor = (mean + deviation * noise) * self.vae.config.scaling_factor
        return latents

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> list[Image.Image]:
        """The images of scaled latents, (B, C, h, w), as `sample_latents` returns them."""
        self._use(self.vae)
        pixels = self.vae.decode(latents.to(self.device) / self.vae.config.scaling_factor, return_dict=False)[0]
        images: list[Image.Image] = self._pipeline.image_processor.postprocess(pixels.float(), output_type="pil")
        return images

    @abstractmethod
    def encode_captions(self, captions: Sequence[str]) -> TextEmbeddings:
        """Captions to the text embeddings that `predict` takes; gradients reach a text encoder's adapter.

        Returns:
            "states", (B, N L, D) for N windows of tokens, and "pooled", (B, P), if the family has it.
        """

    def size_conditions(self, examples: Sequence[Example]) -> TextEmbeddings:
        """Further conditioning of `predict` that depends on each image's size and crop alone; none by default."""
        return {}

    def prompt_embeddings(self, prompts: Sequence[str], negative_prompts: Sequence[str]) -> dict[str, Any]:
        """Keyword arguments for the pipeline in place of prompts, encoded as captions are."""
        names = {"states": "prompt_embeds", "pooled": "pooled_prompt_embeds"}
        wanted, unwanted = self.encode_captions(prompts), self.encode_captions(negative_prompts)
        return {names[name]: tensor for name, tensor in wanted.items()} | {
            f"negative_{names[name]}": tensor for name, tensor in unwanted.items()
        }

    def num_tokens(self, caption: str) -> int:
        """How many tokens a caption has, start and end tokens included."""
        return len(self.tokenizers[0](caption, truncation=False, verbose=False).input_ids)

    def predict(self, noisy: Tensor, timesteps: Tensor, text: TextEmbeddings) -> Tensor:
        """The UNet's prediction (B, C, h, w) in float32, for noisy latents (B, C, h, w) at timesteps (B,)."""
        dtype, more = self.unet.dtype, {}
        if "pooled" in text:
            more["added_cond_kwargs"] = {"text_embeds": text["pooled"].to(dtype), "time_ids": text["sizes"]}
        states = text["states"].to(dtype)
        prediction: Tensor = self.unet(noisy.to(dtype), timesteps, states, return_dict=False, **more)[0]
        return prediction.float()

    def use_zero_terminal_snr(self) -> None:
        """Rescale the schedule to zero terminal SNR, for training and for previews.

        Raises:
            ConfigError: The base predicts epsilon, which says nothing about the image at pure noise.
        """
        if self.prediction_type != "v_prediction":
            raise ConfigError(
                f"loss.zero_terminal_snr needs a v-prediction base model, but {self.path!r} predicts "
                f"{self.prediction_type}. Set it to false; to learn darker and brighter images, raise "
                "loss.noise_offset a little."
            )
        self.alphas_cumprod = zero_terminal_snr(self.alphas_cumprod)
        # Sampling must start at the last timestep too (Lin et al. 2305.08891, section 3.3), which DDIM can.
        self._pipeline.scheduler = DDIMScheduler.from_config(
            self._pipeline.scheduler.config, rescale_betas_zero_snr=True, timestep_spacing="trailing"
        )

    @contextmanager
    def pipeline(self) -> Iterator[DiffusionPipeline]:
        """A pipeline around these networks, adapters included; latents stay in float32 whatever the UNet's dtype.

        It takes the arguments that `prompt_embeddings` returns and has no text encoders of its own.
        """
        self._use(self.vae)
        # diffusers computes on the device of the first network it finds, and reads only these of a text encoder.
        held = vars(self._pipeline)
        encoders = {name: held[name] for name in ("text_encoder", "text_encoder_2") if name in held}
        stand_ins = {name: SimpleNamespace(dtype=e.dtype, config=e.config) for name, e in encoders.items()}
        before = self.unet.register_forward_pre_hook(_cast_inputs, with_kwargs=True)
        after = self.unet.register_forward_hook(lambda _, __, output: tuple(value.float() for value in output))
        held.update(stand_ins)
        try:
            yield self._pipeline
        finally:
            held.update(encoders)
            before.remove()
            after.remove()

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
                move(network, _ASIDE)
        for network in wanted:
            move(network, self.device)

    def fresh_pipeline(self) -> DiffusionPipeline:
        """The base model in float32 on the CPU without adapters: loaded again, but for what has none."""
        held = {name: getattr(self._pipeline, name, None) for name in ("vae", "text_encoder", "text_encoder_2")}
        plain = {name: network for name, network in held.items() if network is not None and not _has_adapter(network)}
        for network in plain.values():
            move(network, torch.device("cpu"))
        return self._reload(torch.float32, **plain)


def _has_adapter(network: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in network.parameters())


def move(network: nn.Module, device: torch.device) -> None:
    """Move a network to a device unless it is there."""
    if next(network.parameters()).device != device:
        network.to(device)


def _one_or_two(pipeline: DiffusionPipeline, part: str) -> Any:
    """A component of a pipeline, and the second of its kind if there is one."""
    found = (getattr(pipeline, name, None) for name in (part, f"{part}_2"))
    return tuple(component for component in found if component is not None)


def _cast_inputs(unet: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
    dtype = next(unet.parameters()).dtype

    def cast(value: Any) -> Any:
        if isinstance(value, dict):
            # Sizes in pixels stay exact: bfloat16 has no odd integers above 256.
            return {name: inner if name == "time_ids" else cast(inner) for name, inner in value.items()}
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    return tuple(cast(value) for value in args), {name: cast(value) for name, value in kwargs.items()}


def weights_identity(module: nn.Module, *descriptions: Any) -> str:
    """A hash of a module's weights and of whatever else decides what it computes."""
    digest = hashlib.blake2b(digest_size=16)
    for description in descriptions:
        # Keys that begin with an underscore say where a network was loaded from, and by which version.
        settings = {key: value for key, value in dict(description).items() if not str(key).startswith("_")}
        digest.update(json.dumps(settings, sort_keys=True, default=str).encode("utf-8"))
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode("utf-8"))
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
