"""LoRA and DoRA layers: a frozen linear layer or convolution with a trained low-rank update.

`inject` puts them into a base's networks; `sdlora.lora.fused` is the fast path, which `TrainingAttention` takes, too.
Shapes: B batch, T tokens, d width, i in, o out, r rank, k kernel, H/W pixels; for a linear layer x is (B, ..., i) and
m is (o,), for a convolution (B, i, H, W) and (1, o, 1, 1).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor, nn

from sdlora.lora.fused import SharedInput, fused_lora
from sdlora.lora.quantize import QuantizedLinear, frozen_weight


class LoraLayer(nn.Module, ABC):
    """A frozen layer W0 with a trained low-rank update: y = W0 x + s B A x, where s = alpha / r.

    A is Gaussian and B zero, so that training starts exactly at the base. Any other A0 and B0 (`set_initial`) are
    subtracted: y = W0 x + s (B A x - B0 A0 x), which starts there too. A and B stay in float32 whatever the base
    computes in, because an update smaller than bfloat16's steps would be lost.

    Args:
        base: The layer to adapt; it is frozen.
        rank: r, at least 1; ranks above min(i k k, o) add nothing.
        alpha: Numerator of the scale, above 0; rounded to float32, as files store it.
        generator: Source of A ~ N(0, 1/r^2), on the CPU.

    Attributes:
        down: A, (r, i) or (r, i, k, k), float32.
        up: B, (o, r) or (o, r, 1, 1), float32.
        live: Tensors to compute with instead of `trained()`, in its order; set during a training step by
            `sdlora.lora.flat_params.FlatWeights.live`.

    Source: Hu et al. 2106.09685, equation 3; the deviation 1/r of A is PEFT's "gaussian".
    """

    base: nn.Linear | QuantizedLinear | nn.Conv2d
    down_init: Tensor | None
    up_init: Tensor | None

    def __init__(
        self,
        base: nn.Linear | QuantizedLinear | nn.Conv2d,
        rank: int,
        alpha: float,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.rank = rank
        self.alpha = torch.tensor(alpha, dtype=torch.float32).item()
        self.enabled = True  # False makes the layer the plain base
        self.strength = 1.0  # factor on the update; 1 as trained
        self.rank_mask: Tensor | None = None  # ranks that each sample uses, (B, r) of zeros and ones, or None for all
        self.dropout = 0.0  # share of A's inputs that is zeroed while `dropout_seeds` is set, in [0, 1)
        self.dropout_seeds: tuple[int, ...] = ()  # one per sample
        self.rank_dropout = 0.0  # share of ranks that `kept_ranks` leaves out
        self.module_dropout = 0.0  # share of samples in which it leaves out all of them
        self.kept_ranks: Tensor | None = None  # factors of each sample's ranks while dropping, (B, r)
        weight = frozen_weight(base)
        (num_outputs, *inputs), device = weight.shape, weight.device
        down = torch.randn((rank, *inputs), generator=generator, dtype=torch.float32) / rank
        self.down = nn.Parameter(down.to(device))
        self.up = nn.Parameter(torch.zeros(num_outputs, rank, *(1 for _ in inputs[1:]), device=device))
        self.live: tuple[Tensor, ...] | None = None
        self.register_buffer("down_init", None)
        self.register_buffer("up_init", None)

    @property
    def scale(self) -> float:
        """s = alpha / r."""
        return self.alpha / self.rank

    @property
    def initial(self) -> tuple[Tensor, Tensor] | None:
        """The frozen A0 and B0 whose product is subtracted, or None."""
        return None if self.down_init is None or self.up_init is None else (self.down_init, self.up_init)

    @property
    def is_plain(self) -> bool:
        """Whether y = W0 x + s B A x is all that the layer ever computes."""
        return self.initial is None and not self.drops

    @property
    def drops(self) -> bool:
        """Whether anything is left out while training."""
        return max(self.dropout, self.rank_dropout, self.module_dropout) > 0.0

    def trained(self) -> tuple[nn.Parameter, ...]:
        """A, B and whatever else a kind of layer trains."""
        return self.down, self.up

    def factors(self) -> tuple[Tensor, ...]:
        """What the layer computes with: `live` during a training step, otherwise `trained()`."""
        return self.live or self.trained()

    def place(self, device: torch.device) -> None:
        """Move what the adapter has of its own to a device, not the frozen layer."""
        for tensor in (*self.parameters(recurse=False), *self.buffers(recurse=False)):
            tensor.data = tensor.data.to(device)

    @torch.no_grad()
    def set_initial(self, down: Tensor, up: Tensor) -> None:
        """Start at A = A0 and B = B0, of the shapes of A and B, and subtract their product from now on."""
        self.down.copy_(down)
        self.up.copy_(up)
        self.down_init, self.up_init = self.down.detach().clone(), self.up.detach().clone()

    def forward(self, x: Tensor) -> Tensor:
        """The adapted layer's output, in the dtype of x."""
        output: Tensor = self.base(x)
        return output + self._update(x) * (self.scale * self.strength) if self.enabled else output

    def _update(self, x: Tensor) -> Tensor:
        """B A x - B0 A0 x, not yet scaled; multiplied in PEFT's order, so that a loaded file rounds alike."""
        down, up, *_ = self.factors()
        if self.dropout_seeds and self.dropout > 0.0:
            x = seeded_dropout(x, self.dropout, self.dropout_seeds)
        update = self._product(x, down, up)
        return update if self.initial is None else update - self._product(x, *self.initial)

    def _product(self, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        inner = self._apply_down(x, down.to(x.dtype))
        for mask in (self.rank_mask, self.kept_ranks):
            if mask is not None:
                # A batch may hold several predictions of the same samples one after the other.
                each = mask.to(inner)
                each = each if len(each) == len(inner) else each.repeat(len(inner) // len(each), 1)
                inner = inner * (each[:, :, None, None] if down.dim() == 4 else each.unsqueeze(1))
        return self._apply_up(inner, up.to(x.dtype))

    @abstractmethod
    def _apply_down(self, x: Tensor, down: Tensor) -> Tensor:
        """A x, with r channels."""

    @abstractmethod
    def _apply_up(self, inner: Tensor, up: Tensor) -> Tensor:
        """B times r channels."""


class LoraLinear(LoraLayer):
    """The LoRA of a linear layer."""

    shared: SharedInput | None = None  # layers on the same input that are computed together with this one

    def forward(self, x: Tensor) -> Tensor:
        """(B, ..., i) to (B, ..., o); in training by one fused operation where the layer allows it."""
        if not (self.enabled and self.is_plain and self.rank_mask is None and torch.is_grad_enabled()):
            return super().forward(x)
        down, up = self.factors()
        weight, scale = frozen_weight(self.base), self.scale * self.strength
        return fused_lora(x, weight, self.base.bias, down.to(x.dtype), up.to(x.dtype).unsqueeze(0), scale)

    def _apply_down(self, x: Tensor, down: Tensor) -> Tensor:
        return F.linear(x, down)

    def _apply_up(self, inner: Tensor, up: Tensor) -> Tensor:
        return F.linear(inner, up)


class LoraConv2d(LoraLayer):
    """The LoRA of a convolution: A has its kernel, stride and padding, B is a 1x1 convolution."""

    base: nn.Conv2d

    def _apply_down(self, x: Tensor, down: Tensor) -> Tensor:
        return F.conv2d(x, down, None, self.base.stride, self.base.padding, self.base.dilation)

    def _apply_up(self, inner: Tensor, up: Tensor) -> Tensor:
        return F.conv2d(inner, up)


class DoraLayer(LoraLayer):
    """A frozen layer W0 with trained direction and magnitude: y = m (W0 + s B A) x / ||W0 + s B A||.

    The norm is that of every output's weights, where m starts (`magnitude`, float32). It follows the update, but no
    gradient passes through it.

    Source: Liu et al. 2402.09353, equation 5; section 4.3 for the norm without a gradient.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.magnitude = nn.Parameter(self._norm().detach())

    @property
    def is_plain(self) -> bool:
        """False: the output depends on the norm as well."""
        return False

    def trained(self) -> tuple[nn.Parameter, ...]:
        """A, B and m."""
        return self.down, self.up, self.magnitude

    def forward(self, x: Tensor) -> Tensor:
        """The adapted layer's output, in the dtype of x."""
        output: Tensor = self.base(x)
        if not self.enabled:
            return output
        ratio = self.factors()[2] / self._norm().detach()
        without_bias = output if self.base.bias is None else output - self.base.bias.view_as(ratio)
        change = (ratio - 1).to(x.dtype) * without_bias + ratio.to(x.dtype) * self._update(x) * self.scale
        return output + change * self.strength

    @abstractmethod
    def _norm(self) -> Tensor:
        """||W0 + s B A|| of every output's weights, in the shape of m."""


class DoraLinear(DoraLayer, LoraLinear):
    """The DoRA of a linear layer."""

    def _norm(self) -> Tensor:
        # B A by applying it to all unit vectors, which rounds as PEFT does.
        units = torch.eye(self.down.shape[1], dtype=self.down.dtype, device=self.down.device)
        product = F.linear(F.linear(units, self.down), self.up).T
        norm: Tensor = torch.linalg.norm(self.base.weight.to(self.down.dtype) + self.scale * product, dim=1)
        return norm


class DoraConv2d(DoraLayer, LoraConv2d):
    """The DoRA of a convolution."""

    def _norm(self) -> Tensor:
        product = torch.mm(self.up.flatten(1), self.down.flatten(1)).view_as(self.base.weight)
        weight = self.base.weight.to(self.down.dtype) + self.scale * product
        norm: Tensor = weight.norm(p=2, dim=(1, 2, 3), keepdim=True).transpose(1, 0)
        return norm


def seeded_dropout(x: Tensor, share: float, seeds: Sequence[int]) -> Tensor:
    """Inverted dropout whose zeros depend on each sample's seed alone; other elements are divided by 1 - share.

    Args:
        x: (B, ...), where B is a multiple of the number of seeds: a batch may hold several predictions of the same
            samples one after the other, which all drop the same elements.
        share: Share of elements to zero, in (0, 1).

    Source: Srivastava et al. 2014, section 10.
    """
    assert len(x) % len(seeds) == 0, f"{len(x)} samples for {len(seeds)} dropout seeds"
    generator = torch.Generator(device=x.device)
    kept = [torch.rand(x.shape[1:], generator=generator.manual_seed(seed), device=x.device) >= share for seed in seeds]
    return x * torch.stack(kept * (len(x) // len(seeds))).to(x.dtype) / (1 - share)


class TrainingAttention:
    """A replacement for diffusers' AttnProcessor2_0 with the same outputs, and no division by one.

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
