"""The fused path of training: a frozen linear layer and its LoRA as one operation that keeps only its input.

`LoraLinear` takes it for one layer, attention for several layers on one input (`SharedInput`).
Shapes: N samples times tokens, J layers on one input, i in, o out (of each), r rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from sdlora.lora.quantize import Packed, QuantizedLinear

if TYPE_CHECKING:
    from sdlora.lora.layers import LoraLinear


def fused_lora(
    x: Tensor, weight: Tensor | Packed, bias: Tensor | None, downs: Tensor, ups: Tensor, scale: float
) -> Tensor:
    """W_j x + b_j + s B_j A_j x for every layer j, in one tensor (..., J o).

    Only x is kept for the backward pass; A x, and the dense form of a packed W, are computed again. An x that needs
    no gradient gets none.

    Args:
        x: (..., i), of the weight's dtype.
        weight: The frozen W_j on top of each other, (J o, i), packed or not.
        bias: (J o,), or None.
        downs: A_j on top of each other, (J r, i), of the weight's dtype.
        ups: B_j, (J, o, r), of the weight's dtype.
        scale: s.

    Source: Hu et al. 2106.09685, equation 3.
    """
    flat = x.reshape(-1, x.shape[-1])
    if torch.compiler.is_compiling():
        return _traced(flat, weight, bias, downs, ups, scale).view(*x.shape[:-1], -1)
    output: Tensor = _FusedLora.apply(flat, weight, bias, downs, ups, scale)  # type: ignore[no-untyped-call]
    return output.view(*x.shape[:-1], -1)


class SharedInput:
    """Plain LoRA layers on the same input, computed as one during a training step.

    Args:
        members: Layers of one shape, rank and scale, plain and without biases; their frozen weights become views of
            one tensor.
    """

    def __init__(self, members: Sequence[LoraLinear]) -> None:
        self.members = tuple(members)
        self.weight = _stacked(members)
        # Every A on top of each other, (J r, i), and every B, (J, o, r); None outside a training step.
        self.live: tuple[Tensor, Tensor] | None = None
        for member in members:
            member.shared = self

    def set_live(self, downs: Tensor, ups: Tensor) -> None:
        """Compute with these tensors from now on; the members get views of them."""
        self.live = downs, ups
        for member, down, up in zip(self.members, downs.view(len(ups), -1, downs.shape[1]), ups, strict=True):
            member.live = down, up

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        """Every member's output for x."""
        first, members = self.members[0], self.members
        alike = all(m.enabled and m.rank_mask is None and m.strength == first.strength for m in members)
        if self.live is None or not alike:
            return tuple(member(x) for member in members)
        return fused_lora(x, self.weight, None, *self.live, first.scale * first.strength).chunk(len(members), dim=-1)


def _stacked(members: Sequence[LoraLinear]) -> Tensor | Packed:
    """The frozen weights on top of each other; those of the layers become views of the result."""
    bases = [member.base for member in members]
    packed = [base for base in bases if isinstance(base, QuantizedLinear)]
    if len(packed) == len(bases):
        codes, scales = torch.cat([base.codes for base in packed]), torch.cat([base.scales for base in packed])
        pieces = zip(packed, codes.chunk(len(packed)), scales.chunk(len(packed)), strict=True)
        for layer, own_codes, own_scales in pieces:
            layer.codes, layer.scales = own_codes, own_scales
        return replace(packed[0].packed, codes=codes, scales=scales)
    weight = torch.cat([base.weight for base in bases]).detach()
    for base, rows in zip(bases, weight.chunk(len(bases)), strict=True):
        base.weight.data = rows
    return weight


class _FusedLora(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | Packed, bias: Tensor | None, downs: Tensor, ups: Tensor, scale: float
    ) -> Tensor:
        ctx.save_for_backward(x, downs, ups)
        ctx.weight, ctx.scale = weight, scale
        weight = _dense(weight)
        num_layers = len(ups)
        output = torch.mm(x, weight.t()) if bias is None else torch.addmm(bias, x, weight.t())
        inner = torch.mm(x, downs.t())
        if num_layers == 1:
            return output.addmm_(inner, ups[0].t(), alpha=scale)
        _by_layer(output, num_layers).baddbmm_(_by_layer(inner, num_layers), ups.transpose(1, 2), alpha=scale)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, downs, ups = ctx.saved_tensors
        num_layers, _, rank = ups.shape
        inner, grad_inner = torch.mm(x, downs.t()), grad.new_empty(len(grad), num_layers * rank)
        if num_layers == 1:
            torch.mm(grad, ups[0], out=grad_inner)
            grad_ups = torch.mm(grad.t(), inner).unsqueeze(0)
        else:
            grads = _by_layer(grad, num_layers)
            torch.bmm(grads, ups, out=_by_layer(grad_inner, num_layers))
            grad_ups = torch.bmm(grads.transpose(1, 2), _by_layer(inner, num_layers))
        if ctx.scale != 1.0:
            grad_inner, grad_ups = grad_inner.mul_(ctx.scale), grad_ups.mul_(ctx.scale)
        grad_downs, grad_x = torch.mm(grad_inner.t(), x), None
        if ctx.needs_input_grad[0]:
            grad_x = torch.mm(grad, _dense(ctx.weight)).addmm_(grad_inner, downs)
        return grad_x, None, None, grad_downs, grad_ups, None


def _dense(weight: Tensor | Packed) -> Tensor:
    return weight.dense() if isinstance(weight, Packed) else weight


def _traced(
    x: Tensor, weight: Tensor | Packed, bias: Tensor | None, downs: Tensor, ups: Tensor, scale: float
) -> Tensor:
    """The same operation for a compiler, which chooses what to keep itself and cannot write into parts of a tensor."""
    output, inner = (_by_layer(F.linear(x, *layer), len(ups)) for layer in ((_dense(weight), bias), (downs, None)))
    return torch.baddbmm(output, inner, ups.transpose(1, 2), alpha=scale).transpose(0, 1).flatten(1)


def _by_layer(stacked: Tensor, num_layers: int) -> Tensor:
    """(N, J n) as (J, N, n), a view."""
    return stacked.view(len(stacked), num_layers, -1).transpose(0, 1)
