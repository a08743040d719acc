"""What the families with a UNet share: CLIP's captions in windows of 77 tokens, a DDPM schedule, and the UNet's call.

Shapes: B batch, C latent channels (4), h/w latents, N windows, L tokens of all of them, D text width, P pooled width.
"""

from __future__ import annotations

import gzip
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.resources import files
from typing import Any, ClassVar, Literal

import torch
from diffusers import DDIMScheduler, DDPMScheduler, DiffusionPipeline
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from sdlora.common import seeds
from sdlora.diffusion.noise import DdpmLevels, check_prediction_type, zero_terminal_snr
from sdlora.errors import BaseModelError, ConfigError
from sdlora.models.architectures import Architecture
from sdlora.models.base import BaseModel, TextEmbeddings

PROBED_TIMESTEPS = (20, 400, 950)
PROBE_EDGE = 16  # of the latents, unless the base is smaller
_MAX_TOKENS = 77
_START, _END = "<|startoftext|>", "<|endoftext|>"


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


class UnetModel(BaseModel):
    """A base model with a UNet.

    Raises:
        BaseModelError: The UNet needs inputs that the family does not have, or the prediction type or noise schedule
            is unsupported.
        ConfigError: The family cannot read captions as `text` asks.
    """

    names: ClassVar[Architecture]
    network_name = "unet"
    network_class = "UNet2DConditionModel"
    default_targets = ("cross_attention",)
    reads_windows = True
    packed_blocks = ".attentions."
    block_lists = ("resnets", "transformer_blocks")
    samplers = ("auto", "base", "euler", "euler_a", "dpmpp_2m_karras", "unipc")
    levels: DdpmLevels

    def _set_up(self, pipeline: DiffusionPipeline) -> None:
        self._refuse_other_inputs()
        self._check_family(pipeline)
        if "beta_schedule" not in pipeline.scheduler.config:
            raise BaseModelError(
                f"{self.path!r} uses {type(pipeline.scheduler).__name__}, whose noise schedule sdlora does not "
                "train. Choose a base model with a DDPM schedule."
            )
        schedule = DDPMScheduler.from_config(pipeline.scheduler.config)
        self.prediction_type = check_prediction_type(schedule.config.prediction_type)
        self.levels = DdpmLevels(schedule.alphas_cumprod.float().to(self.device), self.prediction_type)
        self.latent_factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        self.resolution_px = self.network.config.sample_size * self.latent_factor
        self.max_tokens = self.text.max_windows * (self.tokenizers[0].model_max_length - 2) + 2

    def _refuse_other_inputs(self) -> None:
        """Refuse a UNet that is made for inpainting, depth, editing or image prompts."""
        unet = self.network.config
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

    @staticmethod
    def denoise(network: Any, noisy: Tensor, timesteps: Tensor, text: TextEmbeddings) -> Tensor:
        """The UNet's prediction (B, C, h, w) in float32, for noisy latents (B, C, h, w) at timesteps (B,)."""
        dtype, more = network.dtype, {}
        if "pooled" in text:
            more["added_cond_kwargs"] = {"text_embeds": text["pooled"].to(dtype), "time_ids": text["sizes"]}
        states = text["states"].to(dtype)
        prediction: Tensor = network(noisy.to(dtype), timesteps, states, return_dict=False, **more)[0]
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
        self.levels = replace(self.levels, alphas_cumprod=zero_terminal_snr(self.levels.alphas_cumprod))
        # Sampling must start at the last timestep too (Lin et al. 2305.08891, section 3.3), which DDIM can.
        self._pipeline.scheduler = DDIMScheduler.from_config(
            self._pipeline.scheduler.config, rescale_betas_zero_snr=True, timestep_spacing="trailing"
        )

    @classmethod
    def true_configs(cls) -> tuple[Mapping[str, Any], Mapping[str, Any], tuple[Mapping[str, Any], ...]]:
        """The configurations of its UNet, its VAE and its text encoders, as published."""
        return cls.names.unet, cls.names.vae, cls.names.text_encoders

    @staticmethod
    def empty_text_encoder(config: Mapping[str, Any]) -> nn.Module:
        """A CLIP text encoder without weights."""
        encoder: nn.Module = CLIPTextModel(CLIPTextConfig(**config))
        return encoder

    @staticmethod
    def empty_text(network: Any, text_configs: Sequence[Mapping[str, Any]], batch_size: int) -> TextEmbeddings:
        """Text embeddings without values of one window of CLIP's: (B, L, D), and with them (B, P) and (B, 6)."""
        config, num_tokens = network.config, int(text_configs[0]["max_position_embeddings"])
        found = {"states": torch.empty(batch_size, num_tokens, config.cross_attention_dim)}
        if config.addition_embed_type == "text_time":
            width = int(text_configs[-1]["projection_dim"])
            numbers = config.projection_class_embeddings_input_dim - width
            found["pooled"] = torch.empty(batch_size, width)
            found["sizes"] = torch.empty(batch_size, numbers // config.addition_time_embed_dim)
        return found

    @staticmethod
    def empty_levels() -> DdpmLevels:
        """A schedule without values, of 1000 timesteps."""
        return DdpmLevels(torch.empty(1000), "epsilon")

    @staticmethod
    def probe(network: nn.Module) -> list[Tensor]:
        """The UNet's predictions at three timesteps for fixed inputs, (3, C, h, w)."""
        config: Any = network.config
        batch, more = len(PROBED_TIMESTEPS), {}
        size = min(PROBE_EDGE, config.sample_size)
        latents = seeds.normal((batch, config.in_channels, size, size), 0, "proof latents")
        text = seeds.normal((batch, 77, config.cross_attention_dim), 0, "proof text")
        if config.addition_embed_type == "text_time":
            # Stable Diffusion XL: pooled text embeddings (B, P) and sizes (B, 6).
            sizes = torch.tensor([[1024.0, 1024.0, 0.0, 0.0, 1024.0, 1024.0]]).repeat(batch, 1)
            width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
            pooled = seeds.normal((batch, width), 0, "proof pooled text")
            more["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": sizes}
        return [network(latents, torch.tensor(PROBED_TIMESTEPS), text, return_dict=False, **more)[0]]
