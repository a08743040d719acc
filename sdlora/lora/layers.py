"""The low-rank adapters of linear and convolution layers.

Shapes: B batch, i in, o out, r rank, k kernel, H/W pixels; x is (B, ..., i) for a linear layer and
(B, i, H, W) for a convolution.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdlora.lora.fused import low_rank
from sdlora.lora.quantize import Packed, QuantizedLinear, frozen_weight, stack, unstack


class LoraLayer(nn.Module, ABC):
    """A frozen layer W0 with a trained low-rank update: y = W0 x + s (B m A x - B0 m A0 x), where s = alpha / r.

    A is Gaussian and B zero, so that training starts exactly at the base. Another start (`start_from`) has a frozen
    copy A0, B0 that is subtracted, so that it begins exactly there too. The mask m of ranks is all ones unless
    `rank_mask` is set. A and B are kept in float32 whatever the base computes in, since an update smaller than
    bfloat16's steps would otherwise be lost.

    Args:
        base: The layer to adapt; it is frozen and used as it is.
        rank: r, at least 1 and at most min(i k k, o) to be of use.
        alpha: Numerator of the scale, above 0; rounded to float32, as files hold it.
        generator: Where A is drawn from: N(0, 1/r^2), on the CPU.

    Attributes:
        rank_mask: The ranks that each sample uses, (B, r) of zeros and ones, or None for all.
        dropout: The share of A's inputs that is set to zero while `dropout_seeds` is set.
        dropout_seeds: One number per sample, which alone decides that sample's zeros.
        magnitude: The trained length of every output's weights once `add_magnitude` was called, else None.
        live: A, B and magnitude to compute with instead, while `sdlora.lora.flat_params.FlatWeights.live` says so.
        shared: The layers that this one is computed with, or None.

    Source: Hu et al. 2106.09685, equation 3; the deviation 1/r of A is PEFT's "gaussian".
    """

    base: nn.Linear | QuantizedLinear | nn.Conv2d
    down_start: Tensor | None
    up_start: Tensor | None

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
        self.enabled = True
        self.strength = 1.0
        self.rank_mask: Tensor | None = None
        self.dropout = 0.0
        self.dropout_seeds: tuple[int, ...] = ()
        weight = frozen_weight(base)
        (num_outputs, *inputs), device = weight.shape, weight.device
        down = torch.randn((rank, *inputs), generator=generator, dtype=torch.float32) / rank
        self.down = nn.Parameter(down.to(device))
        self.up = nn.Parameter(torch.zeros(num_outputs, rank, *(1 for _ in inputs[1:]), device=device))
        self.magnitude: nn.Parameter | None = None
        self.live: tuple[Tensor, Tensor, Tensor | None] | None = None
        self.shared: Shared | None = None
        self.register_buffer("down_start", None)
        self.register_buffer("up_start", None)

    @property
    def scale(self) -> float:
        """alpha / r."""
        return self.alpha / self.rank

    @property
    def is_plain(self) -> bool:
        """Whether it is y = W0 x + s B A x and nothing else: no magnitude, no start, no dropout."""
        return self.magnitude is None and self.down_start is None and self.dropout == 0.0

    def weights(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """A, B and magnitude to compute with."""
        if self.shared is not None and self.shared.downs is not None and self.shared.ups is not None:
            place = self.shared.members.index(self)
            down = self.shared.downs.view(-1, *self.down.shape)[place]
            return down, self.shared.ups[place], None
        return self.live or (self.down, self.up, self.magnitude)

    @torch.no_grad()
    def start_from(self, down: Tensor, up: Tensor) -> None:
        """Begin at A = A0 and B = B0 and subtract their product from now on.

        Args:
            down: A0, of A's shape.
            up: B0, of B's shape.
        """
        self.down.copy_(down)
        self.up.copy_(up)
        self.down_start, self.up_start = self.down.detach().clone(), self.up.detach().clone()

    @torch.no_grad()
    def add_magnitude(self) -> None:
        """Train every output's magnitude apart from its direction, from where both are.

        Source: Liu et al. 2402.09353, equation 5.
        """
        self.magnitude = nn.Parameter(self._norm())

    def forward(self, x: Tensor) -> Tensor:
        """The layer's answer, in the type of x."""
        if self.enabled and self.is_plain and self.rank_mask is None and torch.is_grad_enabled():
            return self._plain(x)
        result: Tensor = self.base(x)
        if not self.enabled:
            return result
        down, up, magnitude = self.weights()
        # In this order, and with the products rounded as in PEFT, so that a loaded file gives the same numbers.
        dropped = self._drop(x)
        update = self._product(dropped, down, up)
        if self.down_start is not None and self.up_start is not None:
            update = update - self._product(dropped, self.down_start, self.up_start)
        if magnitude is None:
            return result + update * (self.scale * self.strength)
        # Section 4.3 of the paper: the norm follows the update, but no gradient goes through it.
        ratio = magnitude / self._norm().detach()
        plain = result if self.base.bias is None else result - self._per_output(self.base.bias)
        moved = (ratio - 1).to(x.dtype) * plain + ratio.to(x.dtype) * update * self.scale
        return result + moved * self.strength

    def _plain(self, x: Tensor) -> Tensor:
        """W0 x + s B A x with gradients."""
        down, up, _ = self.weights()
        answer: Tensor = self.base(x) + self._product(x, down, up) * (self.scale * self.strength)
        return answer

    def _product(self, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        inner = self._apply_down(x, down.to(x.dtype))
        if self.rank_mask is not None:
            inner = inner * self._per_rank(self.rank_mask.to(inner))
        return self._apply_up(inner, up.to(x.dtype))

    def _drop(self, x: Tensor) -> Tensor:
        """x with a share of its numbers set to zero and the others raised, as Srivastava et al. do (2014)."""
        if self.dropout == 0.0 or not self.dropout_seeds:
            return x
        count = len(self.dropout_seeds)
        assert len(x) % count == 0, f"{len(x)} samples for {count} seeds of dropout"
        generator = torch.Generator(device=x.device)
        kept = [
            torch.rand(x.shape[1:], generator=generator.manual_seed(seed), device=x.device) >= self.dropout
            for seed in self.dropout_seeds
        ]
        # A batch of several answers to the same samples, one after the other, drops the same inputs in all of them.
        return x * torch.stack(kept * (len(x) // count)).to(x.dtype) / (1 - self.dropout)

    @abstractmethod
    def _apply_down(self, x: Tensor, down: Tensor) -> Tensor:
        """A x."""

    @abstractmethod
    def _apply_up(self, inner: Tensor, up: Tensor) -> Tensor:
        """B of the r inner numbers."""

    @abstractmethod
    def _norm(self) -> Tensor:
        """||W0 + s B A|| of every output's weights, shaped like an answer to be multiplied with."""

    @abstractmethod
    def _per_output(self, values: Tensor) -> Tensor:
        """(o,) in the shape of an answer."""

    @abstractmethod
    def _per_rank(self, mask: Tensor) -> Tensor:
        """(B, r) in the shape of the inner numbers."""


class LoraLinear(LoraLayer):
    """The adapter of a linear layer: A is (r, i), B is (o, r)."""

    def _apply_down(self, x: Tensor, down: Tensor) -> Tensor:
        return F.linear(x, down)

    def _apply_up(self, inner: Tensor, up: Tensor) -> Tensor:
        return F.linear(inner, up)

    def _norm(self) -> Tensor:
        # The product as the answers to all unit vectors, rounded as in PEFT.
        units = torch.eye(self.down.shape[1], dtype=self.down.dtype, device=self.down.device)
        product = F.linear(F.linear(units, self.down), self.up).T
        norm: Tensor = torch.linalg.norm(self.base.weight.to(self.down.dtype) + self.scale * product, dim=1)
        return norm

    def _per_output(self, values: Tensor) -> Tensor:
        return values

    def _per_rank(self, mask: Tensor) -> Tensor:
        return mask.unsqueeze(1)

    def _plain(self, x: Tensor) -> Tensor:
        down, up, _ = self.weights()
        weight, scale = frozen_weight(self.base), self.scale * self.strength
        return low_rank(x, weight, self.base.bias, down.to(x.dtype), up.to(x.dtype).unsqueeze(0), scale)


class Shared:
    """Linear layers that take the same input and are computed as one.

    Args:
        members: Of one shape, rank and scale, without biases, and plain; their frozen weights become views of one
            tensor.

    Attributes:
        downs: Every A on top of each other, (J r, i), while `sdlora.lora.flat_params.FlatWeights.live` says so.
        ups: Every B, (J, o, r), likewise.
    """

    def __init__(self, members: Sequence[LoraLinear]) -> None:
        self.members = tuple(members)
        self.weight = _stacked(members)
        self.downs: Tensor | None = None
        self.ups: Tensor | None = None
        for member in members:
            member.shared = self

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        """Every member's answer to x."""
        first = self.members[0]
        ready = all(member.enabled and member.rank_mask is None for member in self.members)
        if self.downs is None or self.ups is None or not ready or len({m.strength for m in self.members}) > 1:
            return tuple(member(x) for member in self.members)
        together = low_rank(x, self.weight, None, self.downs, self.ups, first.scale * first.strength)
        return together.chunk(len(self.members), dim=-1)


def _stacked(members: Sequence[LoraLinear]) -> Tensor | Packed:
    """Frozen weights on top of each other, of which those of the layers become views."""
    bases = [member.base for member in members]
    packed = [base for base in bases if isinstance(base, QuantizedLinear)]
    if len(packed) == len(bases):
        whole = stack([base.packed for base in packed])
        for layer, part in zip(packed, unstack(whole, len(packed)), strict=True):
            layer.codes, layer.scales = part.codes, part.scales
        return whole
    weight = torch.cat([base.weight for base in bases]).detach()
    for base, rows in zip(bases, weight.chunk(len(bases)), strict=True):
        base.weight.data = rows
    return weight


class LoraConv2d(LoraLayer):
    """The adapter of a convolution, with its kernel, stride and padding in A (r, i, k, k); B is (o, r, 1, 1)."""

    base: nn.Conv2d

    def _apply_down(self, x: Tensor, down: Tensor) -> Tensor:
        return F.conv2d(x, down, None, self.base.stride, self.base.padding, self.base.dilation)

    def _apply_up(self, inner: Tensor, up: Tensor) -> Tensor:
        return F.conv2d(inner, up)

    def _norm(self) -> Tensor:
        product = torch.mm(self.up.flatten(1), self.down.flatten(1)).view_as(self.base.weight)
        weight = self.base.weight.to(self.down.dtype) + self.scale * product
        norm: Tensor = weight.norm(p=2, dim=(1, 2, 3), keepdim=True).transpose(1, 0)
        return norm

    def _per_output(self, values: Tensor) -> Tensor:
        return values.view(1, -1, 1, 1)

    def _per_rank(self, mask: Tensor) -> Tensor:
        return mask[:, :, None, None]
