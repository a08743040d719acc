"""An adapter's parameters in a few long tensors, so that clipping, optimizer and averages handle those instead.

Made by `sdlora.training.train_step`; every A and B stays a parameter of its layer, as a view.
Shapes: J layers on one input, i in, o out, r rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sdlora.lora.fused import SharedInput
from sdlora.lora.inject import Adapter
from sdlora.lora.layers import DoraLayer, LoraLayer, LoraLinear
from sdlora.lora.quantize import frozen_weight

_ON_ONE_INPUT = {"attn1": ("to_q", "to_k", "to_v"), "attn2": ("to_k", "to_v")}


class _Leaf(NamedTuple):
    """One long tensor, the parameters that are its parts, and the dtype that their layers compute in."""

    values: nn.Parameter
    parameters: tuple[nn.Parameter, ...]
    dtype: torch.dtype


class FlatWeights:
    """An adapter's parameters laid end to end, as an optimizer groups them, with its layers' parameters as views.

    Layers of one attention that take the same input are computed as one.
    """

    def __init__(self, adapter: Adapter, groups: Sequence[Sequence[nn.Parameter]]) -> None:
        self._adapter = adapter
        self._shared = _share_inputs(adapter.layers)
        owners = {id(p): layer for layer in adapter.layers.values() for p in layer.parameters(recurse=False)}
        # Every A before every B, so that those of layers on one input lie side by side.
        rank = {id(p): place for place, p in enumerate(adapter.parameters())}
        self._groups: list[list[_Leaf]] = []
        for group in groups:
            leaves = []
            for dtype in dict.fromkeys(_dtype(owners[id(p)]) for p in group):
                chosen = [p for p in group if _dtype(owners[id(p)]) == dtype]
                leaves.append(_join(sorted(chosen, key=lambda p: rank[id(p)]), dtype))
            self._groups.append(leaves)

    @property
    def leaves(self) -> list[list[nn.Parameter]]:
        """The long tensors that an optimizer trains: for each group one per dtype that layers compute in."""
        return [[leaf.values for leaf in leaves] for leaves in self._groups]

    def parts(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Split tensors of the leaves' lengths into views with the shapes and order of `Adapter.parameters`."""
        found: dict[int, Tensor] = {}
        for leaf, tensor in zip(self._all(), tensors, strict=True):
            pieces = torch.split(tensor, [p.numel() for p in leaf.parameters])
            found |= {id(p): piece.view_as(p) for p, piece in zip(leaf.parameters, pieces, strict=True)}
        return [found[id(parameter)] for parameter in self._adapter.parameters()]

    @contextmanager
    def live(self) -> Iterator[None]:
        """Let layers compute with the leaves, so that gradients reach those; for a forward and a backward pass."""
        pieces: dict[int, Tensor] = {}
        joint = {id(p): len(s.members) for s in self._shared for p in s.members[0].trained()}
        for leaf in self._all():
            firsts, sizes = [], []
            rest = iter(leaf.parameters)
            for parameter in rest:
                count = joint.get(id(parameter), 1)
                for _ in range(count - 1):
                    next(rest)
                firsts.append(parameter)
                sizes.append(count * parameter.numel())
            # One conversion for all, so that its gradient comes back as one tensor, too.
            parts = torch.split(leaf.values.to(leaf.dtype), sizes)
            pieces |= {id(parameter): piece for parameter, piece in zip(firsts, parts, strict=True)}
        for shared in self._shared:
            down, up = shared.members[0].trained()
            shared.set_live(
                pieces[id(down)].view(-1, down.shape[1]), pieces[id(up)].view(len(shared.members), *up.shape)
            )
        layers = self._adapter.layers.values()
        for layer in layers:
            if layer.live is None:
                layer.live = tuple(pieces[id(p)].view_as(p) for p in layer.trained())
        try:
            yield
        finally:
            for shared in self._shared:
                shared.live = None
            for layer in layers:
                layer.live = None

    def _all(self) -> list[_Leaf]:
        return [leaf for leaves in self._groups for leaf in leaves]


def _dtype(layer: LoraLayer) -> torch.dtype:
    """The dtype that a layer's A and B are converted to; DoRA's norms need them as they are."""
    return torch.float32 if isinstance(layer, DoraLayer) else frozen_weight(layer.base).dtype


def _join(parameters: Sequence[nn.Parameter], dtype: torch.dtype) -> _Leaf:
    with torch.no_grad():
        values = nn.Parameter(torch.cat([parameter.flatten() for parameter in parameters]))
        pieces = torch.split(values.detach(), [parameter.numel() for parameter in parameters])
        for parameter, piece in zip(parameters, pieces, strict=True):
            parameter.data = piece.view_as(parameter)
    return _Leaf(values, tuple(parameters), dtype)


def _share_inputs(layers: dict[str, LoraLayer]) -> list[SharedInput]:
    """Find the layers of each attention that take the same input and can be computed as one."""
    found = []
    for parent, paths in groupby(layers, key=lambda path: path.rpartition(".")[0]):
        members = {path.rpartition(".")[2]: layers[path] for path in paths}
        names = _ON_ONE_INPUT.get(parent.rpartition(".")[2], ())
        chosen = [member for name in names if isinstance(member := members.get(name), LoraLinear)]
        weights = [(frozen_weight(layer.base), layer) for layer in chosen if layer.is_plain and layer.base.bias is None]
        kinds = {(type(w), w.shape, w.dtype, layer.rank, layer.scale) for w, layer in weights}
        if names and len(weights) == len(names) and len(kinds) == 1:
            found.append(SharedInput(chosen))
    return found
