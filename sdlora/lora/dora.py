"""DoRA layers: LoRA with every output's magnitude trained apart from its direction.

`inject` takes them instead of plain LoRA layers where `lora.dora` is set.
Shapes: i in, o out, r rank, k kernel; m is (o,) for a linear layer and (1, o, 1, 1) for a convolution.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdlora.lora.layers import LoraConv2d, LoraLayer, LoraLinear


class DoraLayer(LoraLayer):
    """A frozen layer W0 with trained direction and magnitude: y = m (W0 + s B A) x / ||W0 + s B A||.

    The norm is that of every output's weights. It follows the update, but no gradient passes through it.

    Args are those of `LoraLayer`.

    Attributes:
        magnitude: m, which starts at ||W0 + s B A||, float32.

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
