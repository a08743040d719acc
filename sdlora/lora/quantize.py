"""Frozen linear layers whose weights are packed in 8 or 4 bits and unpacked for every use.

A base model is packed when it is loaded, before injection. The unpacked weight is never kept, in the backward pass
neither, so that memory falls by what packing saves. Shapes: i in, o out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

Quantization = Literal["int8", "fp8", "nf4"]

TYPICAL_ERRORS: dict[Quantization, tuple[float, float]] = {
    "int8": (0.008, 0.036),
    "fp8": (0.026, 0.026),
    "nf4": (0.093, 0.13),
}
"""The packing error of weights that are normally distributed, and of heavy-tailed ones (Student's t with three degrees
of freedom), 2048 wide."""
_INT8_MAX = 127
_FP8_MAX = 448  # of torch.float8_e4m3fn
_NF4_BLOCK = 64
_MEASURED = 5  # layers from which a network's packing error is estimated


@dataclass(frozen=True)
class Packed:
    """A weight in few bits.

    "int8" rounds each row to multiples, -127 to 127, of the row's own step. "fp8" scales each row to 448 and rounds to
    floats of 4 bits of exponent and 3 of mantissa, so that small elements keep their share of precision beside large
    ones. "nf4" divides each block of 64 elements by its largest and rounds to 16 levels.

    Source: Jacob et al. 1712.05877, section 2.1, without a zero point (int8); Micikevicius et al. 2209.05433, E4M3
    (fp8); Dettmers et al. 2305.14314, section 3, without double quantization (NF4).
    """

    kind: Quantization
    codes: Tensor  # (o, i) int8, (o, i) uint8, the bits of floats, or (o, i / 2) uint8, two elements a byte
    scales: Tensor  # of rows (o, 1), or the largest element of each block (o, i / 64); float32
    dtype: torch.dtype  # of the unpacked weight

    @property
    def shape(self) -> torch.Size:
        """(o, i)."""
        rows, columns = self.codes.shape
        return torch.Size((rows, 2 * columns if self.kind == "nf4" else columns))

    @property
    def device(self) -> torch.device:
        """The device of its codes."""
        return self.codes.device

    @classmethod
    def of(cls, weight: Tensor, kind: Quantization) -> Packed:
        """Pack a weight (o, i); i is a multiple of 64 for "nf4"."""
        smallest = torch.finfo(torch.float32).tiny  # so that a row of zeros is not divided by zero
        if kind == "int8":
            values = weight.detach().float()
            scales = (values.abs().amax(dim=1, keepdim=True) / _INT8_MAX).clamp(min=smallest)
            codes = (values / scales).round().to(torch.int8)
        elif kind == "fp8":
            values = weight.detach().float()
            scales = (values.abs().amax(dim=1, keepdim=True) / _FP8_MAX).clamp(min=smallest)
            # As bits, because a change of a network's type converts its floats.
            codes = (values / scales).to(torch.float8_e4m3fn).view(torch.uint8)
        else:
            values = weight.detach().float().view(len(weight), -1, _NF4_BLOCK)
            scales = values.abs().amax(dim=2).clamp(min=smallest)
            levels = _nf4_levels().to(weight.device)
            nearest = torch.bucketize(values / scales.unsqueeze(2), (levels[1:] + levels[:-1]) / 2)
            high, low = nearest.view(len(weight), -1, 2).unbind(2)
            codes = (16 * high + low).to(torch.uint8)
        return cls(kind, codes, scales, weight.dtype)

    def dense(self) -> Tensor:
        """The unpacked weight, (o, i)."""
        if self.kind == "int8":
            return torch.mul(self.codes, self.scales, out=torch.empty_like(self.codes, dtype=self.dtype))
        if self.kind == "fp8":
            # All of these floats are in bfloat16 and float16, too.
            return self.codes.view(torch.float8_e4m3fn).to(self.dtype).mul_(self.scales)
        # Both elements of a byte at once, from a table of all bytes.
        pairs = F.embedding(self.codes.int(), _nf4_pairs(self.codes.device))
        blocks = pairs.view(len(pairs), -1, _NF4_BLOCK)
        return torch.mul(blocks, self.scales.unsqueeze(2), out=torch.empty_like(blocks, dtype=self.dtype)).flatten(1)


class QuantizedLinear(nn.Module):
    """A frozen linear layer whose weight is packed, though not its bias."""

    codes: Tensor
    scales: Tensor

    def __init__(self, linear: nn.Linear, kind: Quantization) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.kind: Quantization = kind
        self.dtype = linear.weight.dtype
        self.bias = linear.bias
        self.packing_error: float | None = None  # where it was measured
        packed = Packed.of(linear.weight, kind)
        self.register_buffer("codes", packed.codes)
        self.register_buffer("scales", packed.scales)

    @property
    def packed(self) -> Packed:
        """The packed weight."""
        return Packed(self.kind, self.codes, self.scales, self.dtype)

    @property
    def weight(self) -> Tensor:
        """The weight, (o, i), unpacked on every access."""
        return self.packed.dense()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        """Move codes and scales with the network; a change of dtype affects the unpacked weight alone."""
        scales = self.scales
        probe = fn(torch.empty(0, dtype=self.dtype, device=scales.device))
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.scales, self.dtype = scales.to(probe.device), probe.dtype
        return self

    def forward(self, x: Tensor) -> Tensor:
        """W x + b, (..., i) to (..., o)."""
        output: Tensor = _Frozen.apply(x, self.packed, self.bias)  # type: ignore[no-untyped-call]
        return output


class _Frozen(Function):
    """W x + b that keeps only the packed weight for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
        ctx.packed = packed
        return F.linear(x, packed.dense(), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad @ ctx.packed.dense(), None, None


def quantize_linears(network: nn.Module, kind: Quantization, blocks: str = ".attentions.") -> None:
    """Pack the linear layers inside a network's blocks, in place; they have most of its parameters.

    The network has no adapter yet. "nf4" leaves layers whose width is not a multiple of 64 unpacked. Of a few layers
    the packing error is measured, since afterwards it cannot be.

    Args:
        blocks: What the paths of these layers contain, between dots; the default is a UNet's attention blocks.
    """
    layers = _packable(network, kind, blocks)
    measured = set(_spread(list(layers)))
    for path, module in layers.items():
        parent, _, name = path.rpartition(".")
        packed = QuantizedLinear(module, kind)
        if path in measured and not module.weight.is_meta:
            packed.packing_error = packing_error(module.weight, kind)
        setattr(network.get_submodule(parent), name, packed)


def packing_error(weight: Tensor, kind: Quantization) -> float:
    """||W - W'|| / ||W|| of a weight (o, i) and its packed form W': how far packing moves outputs, as a share of them.

    It is the ratio of root mean squares for inputs that are uncorrelated and of one variance.
    """
    dense = weight.detach().float()
    return float((Packed.of(dense, kind).dense() - dense).norm() / dense.norm().clamp(min=1e-30))


def packing_errors(network: nn.Module, blocks: str, kinds: Iterable[Quantization]) -> dict[str, float]:
    """The mean packing error of a few of a network's layers by kind; of a packed one, of its own kind alone."""
    known = [module for module in network.modules() if isinstance(module, QuantizedLinear)]
    found: dict[str, list[float]] = {kind: [] for kind in kinds}
    for kind, errors in found.items():
        if known:
            errors += [m.packing_error for m in known if m.kind == kind and m.packing_error is not None]
        else:
            layers = _packable(network, kind, blocks)  # type: ignore[arg-type]
            errors += [packing_error(layers[path].weight, kind) for path in _spread(list(layers))]  # type: ignore[arg-type]
    return {kind: sum(errors) / len(errors) for kind, errors in found.items() if errors}


def _packable(network: nn.Module, kind: Quantization, blocks: str) -> dict[str, nn.Linear]:
    """The linear layers that are packed, by path; inside adapters there are layers of the base, too."""
    linear = ((path, module) for path, module in network.named_modules() if isinstance(module, nn.Linear))
    return {
        path: module
        for path, module in linear
        if blocks in f".{path}" and (kind != "nf4" or module.in_features % _NF4_BLOCK == 0)
    }


def _spread(paths: list[str]) -> list[str]:
    """A few of many, from the first to the last."""
    return paths[:: max(1, len(paths) // _MEASURED)][:_MEASURED]


def frozen_weight(layer: nn.Module) -> Tensor | Packed:
    """A layer's weight, packed or not; its shape, dtype and device are known without unpacking."""
    return layer.packed if isinstance(layer, QuantizedLinear) else layer.weight  # type: ignore[return-value]


def num_weights(network: nn.Module) -> int:
    """Number of parameters of a network, packed ones included."""
    packed = [m.in_features * m.out_features for m in network.modules() if isinstance(m, QuantizedLinear)]
    return sum(parameter.numel() for parameter in network.parameters()) + sum(packed)


@cache
def _nf4_levels() -> Tensor:
    """The 16 levels of NF4, (16,) from -1 to 1: quantiles of the normal distribution, eight of them above zero."""
    exact: Any = {"dtype": torch.float64, "device": "cpu"}
    outermost = 1 - (1 / 32 + 1 / 30) / 2
    above, below = (torch.special.ndtri(torch.linspace(outermost, 0.5, count, **exact)[:-1]) for count in (9, 8))
    levels = torch.cat([-below, torch.zeros(1, **exact), above.flip(0)])
    return (levels / levels.max()).float()


@cache
def _nf4_pairs(device: torch.device) -> Tensor:
    """The two levels of every byte, (256, 2)."""
    levels = _nf4_levels()
    return torch.stack([levels.repeat_interleave(16), levels.repeat(16)], dim=1).to(device)
