"""Attention for training: projections of one input computed as one, and no division by one.

Put into a UNet by `sdlora.training.train_step`. Shapes: B batch, T tokens, d width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor, nn

from sdlora.lora.layers import LoraLinear


class TrainingAttention:
    """A replacement for diffusers' AttnProcessor2_0 with the same outputs.

    Source: Vaswani et al. 1706.03762, section 3.2.
    """

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Hidden states (B, T, d) to the same shape."""
        if attention_mask is not None:
            plain: Tensor = AttnProcessor2_0()(
                attn, hidden_states, encoder_hidden_states, attention_mask, temb, **kwargs
            )
            return plain
        if encoder_hidden_states is None:
            query, key, value = _project([attn.to_q, attn.to_k, attn.to_v], hidden_states)
        else:
            query = attn.to_q(hidden_states)
            key, value = _project([attn.to_k, attn.to_v], encoder_hidden_states)
        query, key, value = (
            x.view(*x.shape[:-1], attn.heads, x.shape[-1] // attn.heads).transpose(1, 2) for x in (query, key, value)
        )
        mixed = F.scaled_dot_product_attention(query, key, value)
        output: Tensor = attn.to_out[1](attn.to_out[0](mixed.transpose(1, 2).flatten(2)))
        return output


def use_training_attention(unet: nn.Module) -> None:
    """Replace diffusers' attention processors wherever `TrainingAttention` computes the same."""
    for module in unet.modules():
        if isinstance(module, Attention) and type(module.processor) is AttnProcessor2_0:
            # Options that Stable Diffusion's UNets do not use.
            others = (module.spatial_norm, module.group_norm, module.norm_cross, module.norm_q, module.norm_k)
            if not any(others) and not module.residual_connection and module.rescale_output_factor == 1.0:
                module.set_processor(TrainingAttention())


def _project(layers: Sequence[nn.Module], x: Tensor) -> Sequence[Tensor]:
    first = layers[0]
    if isinstance(first, LoraLinear) and first.shared is not None and tuple(layers) == first.shared.members:
        return first.shared(x)
    return [layer(x) for layer in layers]
