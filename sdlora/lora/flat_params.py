"""An adapter's numbers in a few long tensors, so that clipping, the optimizer and averages act on those alone.

Every A and B stays a parameter of its layer, as a view. Shapes: J layers on one input, i in, o out, r rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor, nn

from sdlora.lora.inject import Adapter
from sdlora.lora.layers import LoraLayer, LoraLinear, Shared
from sdlora.lora.quantize import frozen_weight

_ON_ONE_INPUT = {"attn1": ("to_q", "to_k", "to_v"), "attn2": ("to_k", "to_v")}


@dataclass(frozen=True)
class _Leaf:
    """One long tensor: where each of its parameters begins, and the type that layers compute in."""

    values: nn.Parameter
    parameters: tuple[nn.Parameter, ...]
    dtype: torch.dtype


class FlatWeights:
    """Lays an adapter's parameters end to end and gives them back to the layers as views.

    Layers of one attention that take the same input are computed as one.

    Args:
        adapter: Its parameters become views; their values stay.
        groups: Its parameters, as an optimizer groups them.

    Attributes:
        leaves: For each group its long tensors, one for each type that layers compute in.
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
        """What an optimizer trains, by group."""
        return [[leaf.values for leaf in leaves] for leaves in self._groups]

    def parts(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Views of tensors as long as the leaves, in their order, as `Adapter.parameters` has them."""
        found: dict[int, Tensor] = {}
        for leaf, tensor in zip(self._all(), tensors, strict=True):
            pieces = torch.split(tensor, [p.numel() for p in leaf.parameters])
            found |= {id(p): piece.view_as(p) for p, piece in zip(leaf.parameters, pieces, strict=True)}
        return [found[id(parameter)] for parameter in self._adapter.parameters()]

    @contextmanager
    def live(self) -> Iterator[None]:
        """Layers compute with what they are made of now, and gradients reach the leaves.

        Forward and backward pass belong inside.
        """
        pieces: dict[int, Tensor] = {}
        stacked = {id(s.members[0].down): s.members for s in self._shared}
        stacked |= {id(s.members[0].up): s.members for s in self._shared}
        for leaf in self._all():
            # One conversion for all, whose gradient comes back as one tensor, too.
            whole, sizes, owners = leaf.values.to(leaf.dtype), [], []
            rest = iter(leaf.parameters)
            for parameter in rest:
                count = len(stacked.get(id(parameter), (0,)))
                for _ in range(count - 1):
                    next(rest)
                sizes.append(count * parameter.numel())
                owners.append(parameter)
            for parameter, piece in zip(owners, torch.split(whole, sizes), strict=True):
                pieces[id(parameter)] = piece
        for shared in self._shared:
            first = shared.members[0]
            shared.downs = pieces[id(first.down)].view(-1, first.down.shape[1])
            shared.ups = pieces[id(first.up)].view(len(shared.members), *first.up.shape)
        alone = [layer for layer in self._adapter.layers.values() if layer.shared is None]
        for layer in alone:
            magnitude = layer.magnitude
            layer.live = (
                pieces[id(layer.down)].view_as(layer.down),
                pieces[id(layer.up)].view_as(layer.up),
                None if magnitude is None else pieces[id(magnitude)].view_as(magnitude),
            )
        try:
            yield
        finally:
            for shared in self._shared:
                shared.downs = shared.ups = None
            for layer in alone:
                layer.live = None

    def _all(self) -> list[_Leaf]:
        return [leaf for leaves in self._groups for leaf in leaves]


def _dtype(layer: LoraLayer) -> torch.dtype:
    """What a layer's A and B are turned into; norms of weights need them as they are."""
    return frozen_weight(layer.base).dtype if layer.magnitude is None else torch.float32


def _join(parameters: Sequence[nn.Parameter], dtype: torch.dtype) -> _Leaf:
    with torch.no_grad():
        values = nn.Parameter(torch.cat([parameter.flatten() for parameter in parameters]))
        pieces = torch.split(values.detach(), [parameter.numel() for parameter in parameters])
        for parameter, piece in zip(parameters, pieces, strict=True):
            parameter.data = piece.view_as(parameter)
    return _Leaf(values, tuple(parameters), dtype)


def _share_inputs(layers: dict[str, LoraLayer]) -> list[Shared]:
    """Find layers of one attention on the same input, and put their frozen weights on top of each other."""
    found = []
    for parent, paths in groupby(layers, key=lambda path: path.rpartition(".")[0]):
        members = {path.rpartition(".")[2]: layers[path] for path in paths}
        names = _ON_ONE_INPUT.get(parent.rpartition(".")[2], ())
        chosen = [member for name in names if isinstance(member := members.get(name), LoraLinear)]
        if names and len(chosen) == len(names) and len({_kind(layer) for layer in chosen}) == 1:
            found.append(Shared(chosen))
    return found


def _kind(layer: LoraLayer) -> tuple[object, ...]:
    """Layers may be computed together where all of this is the same; what has a slower path is of its own kind."""
    weight = frozen_weight(layer.base)
    plain = layer.is_plain and layer.base.bias is None
    return (type(weight), weight.shape, weight.dtype, layer.rank, layer.scale, None if plain else id(layer))
