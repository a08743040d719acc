"""Z-Image: a flow-matching transformer that reads captions through Qwen3, in the form of a chat.

Shapes: B batch, C latent channels (16), h/w latents, L tokens, D text width (2560).

Source: Z-Image Team 2511.22699; the calls are those of diffusers' ZImagePipeline.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import Qwen3Config, Qwen3Model

from sdlora.common import seeds
from sdlora.diffusion.flow import FlowLevels, level, log_shift
from sdlora.errors import BaseModelError, ConfigError
from sdlora.models.architectures import FamilyNames
from sdlora.models.base import BaseModel, TextEmbeddings, num_blocks

_MAX_TOKENS = 512
_PROBED_LEVELS = (0.05, 0.4, 0.95)
_PROBED_LENGTHS = (7, 20, 33)
_PROBE_EDGE = 16
_COUNTED_TOKENS = 128  # of a caption, in estimates
_PATCH, _HEAD = 2, 128
_TURBO = re.compile(r"(?<!de)(?<!de[-_. ])turbo", re.IGNORECASE)
_NAMED = ("_name_or_path", "modelspec.title", "modelspec.architecture", "general.name")  # where a model's name stands

# The true shape, where it differs from the defaults of diffusers' and transformers' classes.
NETWORK: dict[str, Any] = {
    "in_channels": 16,
    "dim": 3840,
    "n_layers": 30,
    "n_refiner_layers": 2,
    "n_heads": 30,
    "n_kv_heads": 30,
    "cap_feat_dim": 2560,
}
VAE: dict[str, Any] = {
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "latent_channels": 16,
    "sample_size": 1024,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
QWEN3_4B: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": True,
}


class ZImage(BaseModel):
    """Z-Image and models of its shape.

    Captions are cut to their own length before the transformer sees them: it pads them itself, and places the image
    behind them.

    Raises:
        BaseModelError: VAE and transformer do not belong together, or it is the distilled Turbo without a file that is
            merged while training.
        ConfigError: `text` asks for CLIP's layers or windows.
    """

    names = FamilyNames(
        title="Z-Image",
        modelspec="Z-Image",
        base_version="z_image",
        pipeline="ZImagePipeline",
        implementation="https://github.com/Tongyi-MAI/Z-Image",
        presets="z-image",
        lora_prefix="diffusion_model.",
        lora_mark=r"lora_unet_layers_\d+_(attention_to|feed_forward_w)",
        lora_parts=(
            r"noise_refiner|context_refiner|layers|attention|feed_forward|adaLN_modulation|to_q|to_k|to_v|to_out|"
            r"w[123]|cap_embedder|t_embedder|mlp|all_x_embedder|all_final_layer|linear|\d+-\d+|\d+"
        ),
    )
    architecture = names.modelspec
    network_name = "transformer"
    network_class = "ZImageTransformer2DModel"
    default_targets = ("attention",)
    keeps_text_type = True
    packed_blocks = ".layers."
    block_lists = ("noise_refiner", "context_refiner", "layers")
    text_dtype = torch.bfloat16
    trains_text = False
    network_waits = True
    samplers = ("auto", "base")
    few_steps = 8

    def _set_up(self, pipeline: DiffusionPipeline) -> None:
        channels, own = self.network.config.in_channels, self.vae.config.latent_channels
        if channels != own:
            raise BaseModelError(
                f"The transformer of {self.path!r} takes {channels} channels but its VAE has {own}. Put the VAE beside "
                "it that it was made for."
            )
        if self.text.clip_skip is not None or self.text.max_windows != 1:
            name = "data.max_token_windows" if self.text.clip_skip is None else "base.clip_skip"
            raise ConfigError(
                f"{name} is for CLIP, and {self.path!r} reads captions of up to {_MAX_TOKENS} tokens through Qwen3. "
                "Leave it unset."
            )
        self.levels = FlowLevels()
        self.prediction_type = "flow"
        self.log_shift = log_shift(pipeline.scheduler.config.shift)
        self.latent_factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        self.size_step_px = _PATCH * self.latent_factor  # the transformer sees patches of latents
        self.resolution_px = self.vae.config.sample_size
        self.max_tokens = _MAX_TOKENS

    def _asked(self, captions: Sequence[str]) -> list[str]:
        """Captions as a user's turn of a chat, and the beginning of an answer."""
        return [
            self.tokenizers[0].apply_chat_template(
                [{"role": "user", "content": caption}],
                tokenize=False,
                add_generation_prompt=True,
                enable_thinking=True,
            )
            for caption in captions
        ]

    def encode_captions(self, captions: Sequence[str]) -> TextEmbeddings:
        """Captions to {"states": (B, L, D), "mask": (B, L)}, ones where there is a token; longer captions are cut off.

        The states are those of the encoder's second to last layer.
        """
        (tokenizer,), (encoder,) = self.tokenizers, self.move_text_encoders()
        tokens = tokenizer(
            self._asked(captions), padding=True, truncation=True, max_length=_MAX_TOKENS, return_tensors="pt"
        ).to(self.device)
        mask = tokens.attention_mask
        states = encoder(input_ids=tokens.input_ids, attention_mask=mask, output_hidden_states=True).hidden_states[-2]
        return {"states": states, "mask": mask.to(states.dtype)}

    def batched(self, embeddings: Sequence[TextEmbeddings]) -> TextEmbeddings:
        """Text embeddings of single captions as those of a batch in float32, padded to the longest with zeros."""
        return {
            name: pad_sequence([own[name].float() for own in embeddings], batch_first=True) for name in embeddings[0]
        }

    def prompt_embeddings(self, prompts: Sequence[str], negative_prompts: Sequence[str]) -> dict[str, Any]:
        """Keyword arguments for the pipeline in place of prompts, encoded as captions are."""
        wanted, unwanted = self.encode_captions(prompts), self.encode_captions(negative_prompts)
        return {"prompt_embeds": _unpadded(wanted), "negative_prompt_embeds": _unpadded(unwanted)}

    def num_tokens(self, caption: str) -> int:
        """How many tokens a caption has, those of the chat included."""
        return len(self.tokenizers[0](self._asked([caption])[0], truncation=False, verbose=False).input_ids)

    @staticmethod
    def denoise(network: Any, noisy: Tensor, timesteps: Tensor, text: TextEmbeddings) -> Tensor:
        """The velocity (B, C, h, w) in float32, for noisy latents (B, C, h, w) at timesteps (B,)."""
        states = [own.to(network.dtype) for own in _unpadded(text)]
        return velocity(network, noisy.to(network.dtype), level(timesteps).float(), states).float()

    def use_zero_terminal_snr(self) -> None:
        """Refuse it: the highest level of flow matching is pure noise already."""
        raise ConfigError(
            f"loss.zero_terminal_snr is for noise schedules that do not end in pure noise, and that of {self.path!r} "
            "does. Set it to false."
        )

    @classmethod
    def is_distilled(cls, path: str, index: Mapping[str, Any]) -> bool:
        """Whether it is called Turbo; a "De-Turbo" is not."""
        folders = Path(path).parts
        cached = [folder for folder in folders if folder.startswith("models--")]  # in the hub's cache
        names = [*folders[-1:], *cached, *(str(index.get(key, "")) for key in _NAMED)]
        return any(_TURBO.search(name) for name in names)

    @classmethod
    def file_config(cls, tensors: Mapping[str, tuple[int, ...]]) -> Mapping[str, Any] | None:
        """The configuration of a transformer of these shapes; Lumina 2, which has the same names, has no such token."""
        if "cap_pad_token" not in tensors or "cap_embedder.1.weight" not in tensors:
            return None
        dim, text_width = tensors["cap_embedder.1.weight"]
        patches = tensors.get("x_embedder.weight") or tensors.get("all_x_embedder.2-1.weight") or (dim, 0)
        heads = dim // _HEAD
        return NETWORK | {
            "in_channels": patches[1] // _PATCH**2,
            "dim": dim,
            "n_layers": num_blocks(tensors, "layers."),
            "n_refiner_layers": num_blocks(tensors, "noise_refiner."),
            "n_heads": heads,
            "n_kv_heads": heads,
            "cap_feat_dim": text_width,
        }

    @classmethod
    def true_configs(cls) -> tuple[Mapping[str, Any], Mapping[str, Any], tuple[Mapping[str, Any], ...]]:
        """The configurations of its transformer, its VAE and Qwen3 with 4 billion weights."""
        return NETWORK, VAE, (QWEN3_4B,)

    @staticmethod
    def empty_text_encoder(config: Mapping[str, Any]) -> nn.Module:
        """Qwen3 without weights, in bfloat16 as it is published."""
        encoder: nn.Module = Qwen3Model(Qwen3Config(**config)).to(torch.bfloat16)
        return encoder

    @staticmethod
    def empty_text(network: Any, text_configs: Sequence[Mapping[str, Any]], batch_size: int) -> TextEmbeddings:
        """{"states": (B, L, D)} without values, of captions of equal length."""
        return {"states": torch.empty(batch_size, _COUNTED_TOKENS, network.config.cap_feat_dim)}

    @staticmethod
    def empty_levels() -> FlowLevels:
        """Flow matching's levels, which have no values."""
        return FlowLevels()

    def guidance_argument(self, scale: float) -> float:
        """Z-Image's pipeline counts guidance from 0: c + g (c - u)."""
        return scale - 1

    @staticmethod
    def probe(network: nn.Module) -> list[Tensor]:
        """Velocities at three levels for fixed inputs, (3, C, h, w), with which a file is verified."""
        config: Any = network.config
        count, widths = len(_PROBED_LEVELS), config.cap_feat_dim
        latents = seeds.normal((count, config.in_channels, _PROBE_EDGE, _PROBE_EDGE), 0, "proof latents")
        text = [seeds.normal((length, widths), 0, "proof text", length) for length in _PROBED_LENGTHS]
        dtype = next(network.parameters()).dtype
        return [velocity(network, latents.to(dtype), torch.tensor(_PROBED_LEVELS), [own.to(dtype) for own in text])]


def velocity(network: nn.Module, noisy: Tensor, s: Tensor, states: list[Tensor]) -> Tensor:
    """The velocity e - x0 (B, C, h, w): the network is told 1 - s, takes lists, and predicts x0 - e."""
    output = network(list(noisy.unsqueeze(2)), 1 - s, states, return_dict=False)[0]
    return -torch.stack(list(output)).squeeze(2)


def _unpadded(text: TextEmbeddings) -> list[Tensor]:
    """The states of each caption, (L, D), without its padding, of which there is none where there is no mask."""
    if "mask" not in text:
        return list(text["states"])
    lengths = text["mask"].sum(dim=1).long().tolist()
    return [states[:length] for states, length in zip(text["states"], lengths, strict=True)]
