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

from sdlora.common import seeds
from sdlora.diffusion.flow import level, log_shift
from sdlora.errors import BaseModelError
from sdlora.models.architectures import FamilyNames
from sdlora.models.base import TextEmbeddings
from sdlora.models.flow_model import PROBED_LEVELS, QWEN3_4B, FlowModel
from sdlora.models.network_file import num_blocks

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


class ZImage(FlowModel):
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
    network_class = "ZImageTransformer2DModel"
    told = "image share"
    packed_blocks = ".layers."
    block_lists = ("noise_refiner", "context_refiner", "layers")
    thinks = True
    few_steps = 8

    def _set_up(self, pipeline: DiffusionPipeline) -> None:
        channels, own = self.network.config.in_channels, self.vae.config.latent_channels
        if channels != own:
            raise BaseModelError(
                f"The transformer of {self.path!r} takes {channels} channels but its VAE has {own}. Put the VAE beside "
                "it that it was made for."
            )
        super()._set_up(pipeline)
        self.log_shift = log_shift(pipeline.scheduler.config.shift)
        self.latent_factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        self.size_step_px = _PATCH * self.latent_factor  # the transformer sees patches of latents

    def encode_captions(self, captions: Sequence[str]) -> TextEmbeddings:
        """Captions to {"states": (B, L, D), "mask": (B, L)}, ones where there is a token; longer captions are cut off.

        The states are those of the encoder's second to last layer.
        """
        (encoder,) = self.move_text_encoders()
        tokens = self._tokens(captions, padding=True)
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

    @staticmethod
    def denoise(network: Any, noisy: Tensor, timesteps: Tensor, text: TextEmbeddings) -> Tensor:
        """The velocity (B, C, h, w) in float32, for noisy latents (B, C, h, w) at timesteps (B,)."""
        states = [own.to(network.dtype) for own in _unpadded(text)]
        return velocity(network, noisy.to(network.dtype), level(timesteps).float(), states).float()

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
    def empty_text(network: Any, text_configs: Sequence[Mapping[str, Any]], batch_size: int) -> TextEmbeddings:
        """{"states": (B, L, D)} without values, of captions of equal length."""
        return {"states": torch.empty(batch_size, _COUNTED_TOKENS, network.config.cap_feat_dim)}

    def guidance_argument(self, scale: float) -> float:
        """Z-Image's pipeline counts guidance from 0: c + g (c - u)."""
        return scale - 1

    @staticmethod
    def probe(network: nn.Module) -> list[Tensor]:
        """Velocities at three levels for fixed inputs, (3, C, h, w), with which a file is verified."""
        config: Any = network.config
        count, widths = len(PROBED_LEVELS), config.cap_feat_dim
        latents = seeds.normal((count, config.in_channels, _PROBE_EDGE, _PROBE_EDGE), 0, "proof latents")
        text = [seeds.normal((length, widths), 0, "proof text", length) for length in _PROBED_LENGTHS]
        dtype = next(network.parameters()).dtype
        return [velocity(network, latents.to(dtype), torch.tensor(PROBED_LEVELS), [own.to(dtype) for own in text])]


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
