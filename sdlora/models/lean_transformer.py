"""Frozen operations of flow-matching transformers that keep little for the backward pass, in few kernels.

Root mean square norms keep their input and a number for each row, where diffusers keeps it twice, once in float32;
gated activations keep what is multiplied, and compute the activation again; FLUX.2's parallel blocks do not keep the
input of their last layer, which is the attention's output beside such an activation. Norms and rotations agree with
diffusers' up to the rounding of their type, everything else bit for bit; in float64, which is there to compare with,
norms and rotations are diffusers' own.
Shapes: B batch, T tokens, H heads, d width.

Source: Zhang & Sennrich 1910.07467, equation 4; Shazeer 2002.05202, equation 6; Su et al. 2104.09864, equation 34.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.normalization import RMSNorm
from diffusers.models.transformers.transformer_flux2 import Flux2ParallelSelfAttention, Flux2SwiGLU
from diffusers.models.transformers.transformer_z_image import FeedForward
from torch import Tensor, nn
from torch.autograd import Function

_aten = torch.ops.aten
_FUSED = ("cuda", "meta")
"""The devices on which torch has the norm and its gradient as one kernel each."""


def keep_little_of_transformer(network: nn.Module, *, gradient_checkpointing: bool = False) -> None:
    """Make a frozen transformer keep less for the backward pass, in place; without gradients it computes as before.

    Where whole blocks are computed again, nothing in them has to be.
    """
    for module in network.modules():
        if isinstance(module, RMSNorm | nn.RMSNorm) and getattr(module, "bias", None) is None:
            module.forward = partial(_rms_norm, module)  # type: ignore[method-assign]
        elif isinstance(module, FeedForward):
            module._forward_silu_gating = _swiglu
        elif isinstance(module, Flux2SwiGLU):
            module.forward = _swiglu_of_halves
        elif isinstance(module, Flux2ParallelSelfAttention):
            own = module.processor
            plain = own.plain if isinstance(own, _ParallelAttention) else own
            module.set_processor(_ParallelAttention(plain, keeps_input=gradient_checkpointing))


class _ParallelAttention:
    """Attention beside a gated activation, as FLUX.2's blocks of one stream have it.

    Args:
        plain: What computes it without gradients.
        keeps_input: Whether autograd may keep the input of the last layer.
    """

    def __init__(self, plain: Any, *, keeps_input: bool) -> None:
        self.plain, self._keeps_input = plain, keeps_input

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """(B, T, d) to (B, T, d), from rotations' cosines and sines, (T, d / H) each."""
        if image_rotary_emb is None or not torch.is_grad_enabled() or hidden_states.dtype == torch.float64:
            plain: Tensor = self.plain(attn, hidden_states, attention_mask, image_rotary_emb)
            return plain
        projected = attn.to_qkv_mlp_proj(hidden_states)
        inner_width = attn.mlp_hidden_dim * attn.mlp_mult_factor
        heads, inner = projected.split([projected.shape[-1] - inner_width, inner_width], dim=-1)
        query, key, value = heads.unflatten(-1, (3, -1, attn.head_dim)).unbind(dim=2)
        turns = _turns(*image_rotary_emb)
        query, key = (_rotated(norm(x), turns) for norm, x in ((attn.norm_q, query), (attn.norm_k, key)))
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask)
        out = out.transpose(1, 2).flatten(2)
        both = torch.cat([out, attn.mlp_act_fn(inner)], dim=-1)
        if self._keeps_input:
            kept: Tensor = attn.to_out(both)
            return kept
        out, inner = out.detach(), inner.detach()
        with _computed_again(both, lambda: torch.cat([out, attn.mlp_act_fn(inner)], dim=-1)):
            result: Tensor = attn.to_out(both)
        return result


@contextmanager
def _computed_again(x: Tensor, compute: Callable[[], Tensor]) -> Iterator[None]:
    """Where autograd would keep x or a reshaped x, let it compute x again on the way back."""
    storage = x.untyped_storage()

    def pack(tensor: Tensor) -> Any:
        is_x = tensor.untyped_storage()._cdata == storage._cdata and tensor.numel() == x.numel()
        return tensor.shape if is_x else tensor

    def unpack(kept: Any) -> Tensor:
        return kept if isinstance(kept, Tensor) else compute().view(kept)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def _turns(cos: Tensor, sin: Tensor) -> Tensor:
    """Angles as complex numbers, (T, 1, d / 2), from their cosines and sines, twice each, (T, d)."""
    return torch.complex(cos[:, None, ::2], sin[:, None, ::2])


def _rotated(x: Tensor, turns: Tensor) -> Tensor:
    if not x.requires_grad:
        return _rotate(x, turns)
    output: Tensor = _Rotation.apply(x, turns)  # type: ignore[no-untyped-call]
    return output


def _rotate(x: Tensor, turns: Tensor) -> Tensor:
    """Pairs of neighbours in x, (B, T, H, d), turned by angles; see `_turns`."""
    pairs = x.to(torch.promote_types(x.dtype, torch.float32)).contiguous().view(*x.shape[:-1], -1, 2)
    return torch.view_as_real(torch.view_as_complex(pairs) * turns).flatten(-2).to(x.dtype)


class _Rotation(Function):
    """`_rotate`, which keeps the angles alone: its gradient is turned back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, turns: Tensor) -> Tensor:
        ctx.save_for_backward(turns)
        return _rotate(x, turns)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (turns,) = ctx.saved_tensors
        return _rotate(grad, turns.conj().resolve_conj()), None


def _rms_norm(module: RMSNorm | nn.RMSNorm, x: Tensor) -> Tensor:
    is_lean = torch.is_grad_enabled() and x.requires_grad and x.dtype != torch.float64
    if not is_lean or module.weight is None or module.weight.requires_grad:
        plain: Tensor = type(module).forward(module, x)
        return plain
    eps = torch.finfo(x.dtype).eps if module.eps is None else module.eps
    output: Tensor = _RmsNorm.apply(x, module.weight.to(x.dtype), eps)  # type: ignore[no-untyped-call]
    return output


def _swiglu(gate: Tensor, hidden: Tensor) -> Tensor:
    """SiLU(gate) * hidden, (B, T, d)."""
    if not (torch.is_grad_enabled() and gate.requires_grad and hidden.requires_grad):
        return F.silu(gate) * hidden
    output: Tensor = _Swiglu.apply(gate, hidden)  # type: ignore[no-untyped-call]
    return output


def _swiglu_of_halves(x: Tensor) -> Tensor:
    """SiLU(gate) * hidden of their concatenation, (B, T, 2 d)."""
    if not (torch.is_grad_enabled() and x.requires_grad):
        return _swiglu(*x.chunk(2, dim=-1))
    output: Tensor = _SwigluOfHalves.apply(x)  # type: ignore[no-untyped-call]
    return output


class _RmsNorm(Function):
    """weight * x / sqrt(mean(x^2) + eps) over the last axis, computed in float32 or the type of x if that is finer."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        if x.device.type in _FUSED:
            y, rstd = _aten._fused_rms_norm(x, weight.shape, weight, eps)
        else:
            fine = x.to(torch.promote_types(x.dtype, torch.float32))
            rstd = fine.square().mean(dim=-1, keepdim=True).add_(eps).rsqrt_()
            y = (fine * rstd).mul_(weight).to(x.dtype)
        ctx.save_for_backward(x, weight, rstd)
        found: Tensor = y
        return found

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rstd = ctx.saved_tensors
        if x.device.type in _FUSED:
            return _aten._fused_rms_norm_backward(grad, x, weight.shape, rstd, weight, [True, False])[0], None, None
        fine, scaled = x.to(rstd.dtype) * rstd, grad.to(rstd.dtype) * weight
        along = (fine * scaled).mean(dim=-1, keepdim=True)
        return scaled.addcmul_(fine, along, value=-1).mul_(rstd).to(x.dtype), None, None


class _Swiglu(Function):
    """SiLU(gate) * hidden, (B, T, d), that keeps both."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, hidden: Tensor) -> Tensor:
        ctx.save_for_backward(gate, hidden)
        return F.silu(gate).mul_(hidden)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, hidden = ctx.saved_tensors
        return _aten.silu_backward(grad * hidden, gate), F.silu(gate).mul_(grad)


class _SwigluOfHalves(Function):
    """The same of their concatenation, (B, T, 2 d), whose gradient is written in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        gate, hidden = x.chunk(2, dim=-1)
        return F.silu(gate).mul_(hidden)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        gate, hidden = x.chunk(2, dim=-1)
        both = torch.empty_like(x)
        grad_gate, grad_hidden = both.chunk(2, dim=-1)
        _aten.silu_backward.grad_input(grad * hidden, gate, grad_input=grad_gate)
        torch.mul(F.silu(gate), grad, out=grad_hidden)
        return both
