"""FLUX.2 klein: a flow-matching transformer that reads three layers of Qwen3, and predicts latents in patches of 2 x 2.

Shapes: B batch, C channels of a patch (128), h/w patches, L tokens (512), D text width (three times Qwen3's).

Source: Black Forest Labs, FLUX.2; the calls are those of diffusers' Flux2KleinPipeline.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from sdlora.common import seeds
from sdlora.diffusion.flow import level, resolution_shift
from sdlora.errors import BaseModelError
from sdlora.models.architectures import FamilyNames
from sdlora.models.base import TextEmbeddings
from sdlora.models.flow_model import MAX_TOKENS, PROBED_LEVELS, QWEN3_4B, QWEN3_8B, FlowModel
from sdlora.models.network_file import num_blocks

_LAYERS = (9, 18, 27)
_PATCH, _HEAD = 2, 128
_DISTILLED = re.compile(r"klein[-_. ]?[49]b", re.IGNORECASE)
# The number of patches, and ln k there: the line of FLUX.1, which the trainers of FLUX.2 shift along as well.
_FEW, _MANY = (256, 0.5), (4096, 1.15)
_PROBED_LENGTH, _PROBE_EDGE = 20, 8

# The true shapes, where they differ from the defaults of diffusers' and transformers' classes.
NETWORK_4B: dict[str, Any] = {
    "in_channels": 128,
    "num_layers": 5,
    "num_single_layers": 20,
    "num_attention_heads": 24,
    "joint_attention_dim": 7680,
    "guidance_embeds": False,
}
NETWORK_9B: dict[str, Any] = NETWORK_4B | {
    "num_layers": 8,
    "num_single_layers": 24,
    "num_attention_heads": 32,
    "joint_attention_dim": 12288,
}
VAE: dict[str, Any] = {
    "_class_name": "AutoencoderKLFlux2",
    "block_out_channels": [128, 256, 512, 512],
    "latent_channels": 32,
    "sample_size": 1024,
}

_STREAMS = {
    "img": ("to_q", "to_k", "to_v", "to_out.0", "ff"),
    "txt": ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "ff_context"),
}


def _authors_layers() -> dict[str, tuple[str, ...]]:
    """Patterns of Black Forest Labs' module paths to diffusers'; the authors fuse queries, keys and values."""
    block = r"transformer_blocks.\1"
    layers: dict[str, tuple[str, ...]] = {}
    for stream, (q, k, v, out, mlp) in _STREAMS.items():
        theirs = rf"double_blocks\.(\d+)\.{stream}"
        layers[rf"{theirs}_attn\.qkv"] = (f"{block}.attn.{q}", f"{block}.attn.{k}", f"{block}.attn.{v}")
        layers[rf"{theirs}_attn\.proj"] = (f"{block}.attn.{out}",)
        layers[rf"{theirs}_mlp\.0"] = (f"{block}.{mlp}.linear_in",)
        layers[rf"{theirs}_mlp\.2"] = (f"{block}.{mlp}.linear_out",)
        layers[rf"double_stream_modulation_{stream}\.lin"] = (f"double_stream_modulation_{stream}.linear",)
    for theirs, ours in (("linear1", "to_qkv_mlp_proj"), ("linear2", "to_out")):
        layers[rf"single_blocks\.(\d+)\.{theirs}"] = (f"single_{block}.attn.{ours}",)
    layers[r"single_stream_modulation\.lin"] = ("single_stream_modulation.linear",)
    layers[r"img_in"], layers[r"txt_in"] = ("x_embedder",), ("context_embedder",)
    layers[r"time_in\.in_layer"] = ("time_guidance_embed.timestep_embedder.linear_1",)
    layers[r"time_in\.out_layer"] = ("time_guidance_embed.timestep_embedder.linear_2",)
    layers[r"final_layer\.linear"] = ("proj_out",)
    return layers


def _names(size: str, width: int) -> FamilyNames:
    return FamilyNames(
        title=f"FLUX.2 klein {size}",
        modelspec=f"Flux.2-klein-{size.lower()}",
        base_version=f"flux_2_klein_{size.lower()}",
        pipeline="Flux2KleinPipeline",
        implementation="https://github.com/black-forest-labs/flux2",
        presets="flux2-klein",
        lora_prefix="transformer.",
        lora_mark=r"lora_unet_(single_transformer_blocks_\d+_attn_to_(qkv_mlp_proj|out$)|transformer_blocks_\d+_ff_(context_)?linear)",
        lora_width=width,
        lora_parts=(
            r"single_transformer_blocks|transformer_blocks|attn|to_qkv_mlp_proj|to_q|to_k|to_v|to_out|add_[qkv]_proj|"
            r"to_add_out|ff_context|ff|linear_in|linear_out|single_stream_modulation|double_stream_modulation_(?:img|txt)|"
            r"x_embedder|context_embedder|time_guidance_embed|timestep_embedder|linear_[12]|linear|proj_out|norm_out|\d+"
        ),
        lora_authors=_authors_layers(),
    )


class Flux2Klein(FlowModel):
    """FLUX.2 klein base 4B and models of its shape.

    Captions are padded to 512 tokens, which the transformer sees all of. The latents here are those of the VAE in
    patches of 2 x 2, normalised by the mean and variance of each channel that the VAE brings along.

    Raises:
        BaseModelError: Transformer, VAE and text encoder do not belong together, or it is distilled.
        ConfigError: `text` asks for CLIP's layers or windows.
    """

    names = _names("4B", 3072)
    architecture = names.modelspec
    network_class = "Flux2Transformer2DModel"
    told = "noise share"
    packed_blocks = "transformer_blocks."
    block_lists = ("transformer_blocks", "single_transformer_blocks")
    thinks = False
    few_steps = 4

    def _set_up(self, pipeline: DiffusionPipeline) -> None:
        _refuse_other_parts(self.path, self.network.config, self.vae.config, self.text_encoders[0].config)
        super()._set_up(pipeline)
        # It would choose the next word, which nothing asks for, and takes 1.2 GiB of Qwen3-8B.
        self.text_encoders[0].lm_head = nn.Identity()
        self.latent_factor = _PATCH * 2 ** (len(self.vae.config.block_out_channels) - 1)
        self.size_step_px = self.latent_factor
        self.log_shift = self.log_shift_at((self.resolution_px, self.resolution_px))

    def log_shift_at(self, size_px: tuple[int, int]) -> float:
        """Larger images are shifted further towards noise, by their number of patches."""
        width, height = (edge // self.latent_factor for edge in size_px)
        return resolution_shift(width * height, _FEW, _MANY)

    @torch.no_grad()
    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] to posterior moments in patches, (B, 2C, h, w): the mean, then the log-variance."""
        self._use(self.vae)
        moments: Tensor = self.vae.encode(pixels.to(self.device)).latent_dist.parameters
        return torch.cat([pixel_unshuffle(half, _PATCH) for half in moments.chunk(2, dim=1)], dim=1)

    def sample_latents(self, moments: Tensor, noise: Tensor) -> Tensor:
        """Normalised latents (B, C, h, w): the posterior's mean; FLUX.2 draws nothing from it, so `noise` is unused."""
        mean, deviation = self._normalisation()
        return (moments.float().chunk(2, dim=1)[0] - mean.to(moments.device)) / deviation.to(moments.device)

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> list[Image.Image]:
        """The images of normalised latents, (B, C, h, w), as `sample_latents` returns them."""
        self._use(self.vae)
        mean, deviation = self._normalisation()
        own = pixel_shuffle(latents.to(self.device) * deviation + mean, _PATCH)
        pixels = self.vae.decode(own, return_dict=False)[0]
        images: list[Image.Image] = self._pipeline.image_processor.postprocess(pixels.float(), output_type="pil")
        return images

    def _normalisation(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each channel of a patch, (1, C, 1, 1), where the VAE is."""
        norm: Any = self.vae.bn
        mean, variance = (x.view(1, -1, 1, 1) for x in (norm.running_mean, norm.running_var))
        return mean, (variance + self.vae.config.batch_norm_eps).sqrt()

    def encode_captions(self, captions: Sequence[str]) -> TextEmbeddings:
        """Captions to {"states": (B, L, D)}, padded to 512 tokens; longer captions are cut off.

        The states of three of the encoder's layers, side by side.
        """
        (encoder,) = self.move_text_encoders()
        tokens = self._tokens(captions, padding="max_length")
        output = encoder.base_model(
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            output_hidden_states=True,
            use_cache=False,
        )
        return {"states": torch.cat([output.hidden_states[layer] for layer in _LAYERS], dim=-1)}

    def prompt_embeddings(self, prompts: Sequence[str], negative_prompts: Sequence[str]) -> dict[str, Any]:
        """Keyword arguments for the pipeline in place of prompts, encoded as captions are."""
        # The pipeline draws its noise in their type.
        wanted, unwanted = (self.encode_captions(texts)["states"].float() for texts in (prompts, negative_prompts))
        return {"prompt_embeds": wanted, "negative_prompt_embeds": unwanted}

    @staticmethod
    def denoise(network: Any, noisy: Tensor, timesteps: Tensor, text: TextEmbeddings) -> Tensor:
        """The velocity (B, C, h, w) in float32, for noisy latents (B, C, h, w) at timesteps (B,)."""
        dtype = network.dtype
        return velocity(network, noisy.to(dtype), level(timesteps).float(), text["states"].to(dtype)).float()

    @classmethod
    def fits(cls, config: Mapping[str, Any]) -> bool:
        """Whether a transformer is not of the larger size."""
        return not Flux2Klein9B.fits(config)

    @classmethod
    def is_distilled(cls, path: str, index: Mapping[str, Any]) -> bool:
        """Whether its index says so, or a file has the distilled model's name."""
        if "is_distilled" in index:
            return bool(index["is_distilled"])
        names = (Path(path).name, str(index.get("modelspec.title", "")))
        return any(_DISTILLED.search(name) and "base" not in name.lower() for name in names)

    @classmethod
    def file_config(cls, tensors: Mapping[str, tuple[int, ...]]) -> Mapping[str, Any] | None:
        """The configuration of a transformer of these shapes; FLUX.2 dev, whose guidance is an input, is another."""
        if not any(f"double_stream_modulation_img.{name}.weight" in tensors for name in ("lin", "linear")):
            return None
        if any(name.startswith(("guidance_in.", "time_guidance_embed.guidance_embedder.")) for name in tensors):
            return None
        (width, channels), (_, text_width) = (
            next((tensors[f"{name}.weight"] for name in names if f"{name}.weight" in tensors), (0, 0))
            for names in (("img_in", "x_embedder"), ("txt_in", "context_embedder"))
        )
        return NETWORK_4B | {
            "in_channels": channels,
            "num_layers": num_blocks(tensors, "double_blocks.") or num_blocks(tensors, "transformer_blocks."),
            "num_single_layers": num_blocks(tensors, "single_blocks.")
            or num_blocks(tensors, "single_transformer_blocks."),
            "num_attention_heads": width // _HEAD,
            "joint_attention_dim": text_width,
        }

    @classmethod
    def true_configs(cls) -> tuple[Mapping[str, Any], Mapping[str, Any], tuple[Mapping[str, Any], ...]]:
        """The configurations of its transformer, its VAE and Qwen3 with 4 billion weights."""
        return NETWORK_4B, VAE, (QWEN3_4B,)

    @staticmethod
    def empty_text(network: Any, text_configs: Sequence[Mapping[str, Any]], batch_size: int) -> TextEmbeddings:
        """{"states": (B, L, D)} without values."""
        return {"states": torch.empty(batch_size, MAX_TOKENS, network.config.joint_attention_dim)}

    @staticmethod
    def latent_shape(network: Mapping[str, Any], vae: Mapping[str, Any]) -> tuple[int, int]:
        """C, and pixels per patch along one edge, by the configurations of network and VAE."""
        return int(network["in_channels"]), int(_PATCH * 2 ** (len(vae["block_out_channels"]) - 1))

    @staticmethod
    def probe(network: nn.Module) -> list[Tensor]:
        """Velocities at three levels for fixed inputs, (3, C, h, w), with which a file is verified."""
        config: Any = network.config
        count, dtype = len(PROBED_LEVELS), next(network.parameters()).dtype
        latents = seeds.normal((count, config.in_channels, _PROBE_EDGE, _PROBE_EDGE), 0, "proof latents")
        states = seeds.normal((count, _PROBED_LENGTH, config.joint_attention_dim), 0, "proof text")
        return [velocity(network, latents.to(dtype), torch.tensor(PROBED_LEVELS), states.to(dtype))]


class Flux2Klein9B(Flux2Klein):
    """FLUX.2 klein base 9B, which reads captions through a larger Qwen3."""

    names = _names("9B", 4096)
    architecture = names.modelspec

    @classmethod
    def fits(cls, config: Mapping[str, Any]) -> bool:
        """Whether a transformer reads text of its width."""
        return bool(config["joint_attention_dim"] == NETWORK_9B["joint_attention_dim"])

    @classmethod
    def true_configs(cls) -> tuple[Mapping[str, Any], Mapping[str, Any], tuple[Mapping[str, Any], ...]]:
        """The configurations of its transformer, its VAE and Qwen3 with 8 billion weights."""
        return NETWORK_9B, VAE, (QWEN3_8B,)


def velocity(network: nn.Module, noisy: Tensor, s: Tensor, states: Tensor) -> Tensor:
    """The velocity e - x0 (B, C, h, w), for patches at levels s (B,) and text states (B, L, D)."""
    height, width = noisy.shape[2:]
    output: Tensor = network(
        hidden_states=noisy.flatten(2).transpose(1, 2),
        encoder_hidden_states=states,
        timestep=s,
        img_ids=_positions(noisy.device, 1, height, width, 1),
        txt_ids=_positions(noisy.device, 1, 1, 1, states.shape[1]),
        return_dict=False,
    )[0]
    return output.transpose(1, 2).reshape(noisy.shape)


def _positions(device: torch.device, *sizes: int) -> Tensor:
    """Places on four axes (time, row, column, token), the last fastest, (product of the sizes, 4)."""
    return torch.cartesian_prod(*(torch.arange(size, device=device) for size in sizes))


def _refuse_other_parts(path: str, network: Any, vae: Any, text: Any) -> None:
    """Refuse networks that were made for others."""
    if network.in_channels != (channels := vae.latent_channels * _PATCH**2):
        raise BaseModelError(
            f"The transformer of {path!r} takes {network.in_channels} channels but its VAE gives {channels} in patches "
            f"of {_PATCH} x {_PATCH}. Put the VAE beside it that it was made for."
        )
    width = text.hidden_size * len(_LAYERS)
    if text.num_hidden_layers < _LAYERS[-1] or network.joint_attention_dim != width:
        raise BaseModelError(
            f"The transformer of {path!r} reads text of width {network.joint_attention_dim} from the layers 9, 18 and "
            f"27, but its text encoder has {text.num_hidden_layers} layers of {text.hidden_size}. klein 4B is made for "
            "Qwen3-4B, and klein 9B for Qwen3-8B: put that one beside it."
        )
