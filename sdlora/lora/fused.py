"""A frozen linear layer and its low-rank update as one operation, for one layer or several on the same input.

Shapes: N samples times tokens, J layers on one input, i in, o out (of each), r rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from sdlora.lora.quantize import Packed


def low_rank(
    x: Tensor, weight: Tensor | Packed, bias: Tensor | None, downs: Tensor, ups: Tensor, scale: float
) -> Tensor:
    """W_j x + b_j + s B_j A_j x for every j, in one tensor.

    It keeps x alone, once; what is of rank r, and a packed W, is computed again on the way back. No gradient is
    computed for an x that needs none.

    Args:
        x: (..., i), of the weight's type.
        weight: The frozen W_j on top of each other, (J o, i), packed or not.
        bias: (J o,), or None.
        downs: A_j on top of each other, (J r, i), of the weight's type.
        ups: B_j, (J, o, r), of the weight's type.
        scale: s.

    Returns:
        (..., J o).

    Source: Hu et al. 2106.09685, equation 3.
    """
    flat = x.reshape(-1, x.shape[-1])
    if torch.compiler.is_compiling():
        return _traced(flat, weight, bias, downs, ups, scale).view(*x.shape[:-1], -1)
    answer: Tensor = _LowRank.apply(flat, weight, bias, downs, ups, scale)  # type: ignore[no-untyped-call]
    return answer.view(*x.shape[:-1], -1)


class _LowRank(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | Packed, bias: Tensor | None, downs: Tensor, ups: Tensor, scale: float
    ) -> Tensor:
        ctx.save_for_backward(x, downs, ups)
        ctx.weight, ctx.scale = weight, scale
        weight = _dense(weight)
        num_layers = len(ups)
        answer = torch.mm(x, weight.t()) if bias is None else torch.addmm(bias, x, weight.t())
        inner = torch.mm(x, downs.t())
        if num_layers == 1:
            return answer.addmm_(inner, ups[0].t(), alpha=scale)
        _by_layer(answer, num_layers).baddbmm_(_by_layer(inner, num_layers), ups.transpose(1, 2), alpha=scale)
        return answer

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
    """The same for a compiler, which chooses itself what is kept and cannot write into parts of a tensor."""
    answer, inner = (_by_layer(F.linear(x, *layer), len(ups)) for layer in ((_dense(weight), bias), (downs, None)))
    return torch.baddbmm(answer, inner, ups.transpose(1, 2), alpha=scale).transpose(0, 1).flatten(1)


def _by_layer(stacked: Tensor, num_layers: int) -> Tensor:
    """(N, J n) as (J, N, n), a view."""
    return stacked.view(len(stacked), num_layers, -1).transpose(0, 1)
