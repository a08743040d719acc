"""What flow-matching transformers share that read captions through Qwen3, as users' turns of a chat.

Shapes: L tokens, D text width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline
from torch import nn
from transformers import AutoModel, Qwen3Config

from sdlora.diffusion.flow import FlowLevels
from sdlora.errors import ConfigError
from sdlora.models.base import BaseModel

MAX_TOKENS = 512
PROBED_LEVELS = (0.05, 0.4, 0.95)
# Their true shapes, where they differ from the defaults of transformers' class.
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
QWEN3_8B: dict[str, Any] = QWEN3_4B | {"hidden_size": 4096, "intermediate_size": 12288, "tie_word_embeddings": False}


class FlowModel(BaseModel):
    """A base model with a flow-matching transformer and Qwen3.

    Attributes:
        thinks: Whether the answer that the chat leaves open may begin with thoughts.

    Raises:
        BaseModelError: Transformer, VAE and text encoder do not belong together.
        ConfigError: `text` asks for CLIP's layers or windows.
    """

    network_name = "transformer"
    default_targets = ("attention",)
    keeps_text_type = True
    text_dtype = torch.bfloat16
    trains_text = False
    network_waits = True
    samplers = ("auto", "base")
    thinks: ClassVar[bool]

    def _set_up(self, pipeline: DiffusionPipeline) -> None:
        if self.text.clip_skip is not None or self.text.max_windows != 1:
            name = "data.max_token_windows" if self.text.clip_skip is None else "base.clip_skip"
            raise ConfigError(
                f"{name} is for CLIP, and {self.path!r} reads captions of up to {MAX_TOKENS} tokens through Qwen3. "
                "Leave it unset."
            )
        self.levels = FlowLevels()
        self.prediction_type = "flow"
        self.resolution_px = self.vae.config.sample_size
        self.max_tokens = MAX_TOKENS

    def _asked(self, captions: Sequence[str]) -> list[str]:
        """Captions as a user's turn of a chat, and the beginning of an answer."""
        return [
            self.tokenizers[0].apply_chat_template(
                [{"role": "user", "content": caption}],
                tokenize=False,
                add_generation_prompt=True,
                enable_thinking=self.thinks,
            )
            for caption in captions
        ]

    def _tokens(self, captions: Sequence[str], padding: bool | str) -> Any:
        """What the tokenizer gives for captions on the device; longer ones are cut off."""
        return self.tokenizers[0](
            self._asked(captions), padding=padding, truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        ).to(self.device)

    def num_tokens(self, caption: str) -> int:
        """How many tokens a caption has, those of the chat included."""
        return len(self.tokenizers[0](self._asked([caption])[0], truncation=False, verbose=False).input_ids)

    def use_zero_terminal_snr(self) -> None:
        """Refuse it: the highest level of flow matching is pure noise already."""
        raise ConfigError(
            f"loss.zero_terminal_snr is for noise schedules that do not end in pure noise, and that of {self.path!r} "
            "does. Set it to false."
        )

    @staticmethod
    def empty_text_encoder(config: Mapping[str, Any]) -> nn.Module:
        """Qwen3 without weights, in bfloat16 as it is published; its rotations stay in float32."""
        encoder: nn.Module = AutoModel.from_config(Qwen3Config(**config), dtype=torch.bfloat16)
        return encoder

    @staticmethod
    def empty_levels() -> FlowLevels:
        """Flow matching's levels, which have no values."""
        return FlowLevels()
