"""What a piece of torch code costs, counted without running it: bytes, kernels and floating-point operations.

On the meta device tensors have shapes and no numbers, so that any model is counted on any machine.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_flop_count, shape_wrapper


@dataclass
class Cost:
    """What was counted.

    Attributes:
        peak_bytes: The most that was held at once by storages made meanwhile.
        held_bytes: What is held by them now.
        kernels: Operations that compute; views and bare allocations are none.
        flops: Of matrix products, convolutions and attention; a multiplication with its addition is two.
    """

    peak_bytes: int = 0
    held_bytes: int = 0
    kernels: int = 0
    flops: int = 0


@contextmanager
def meta_attention() -> Iterator[None]:
    """Attention on the meta device by the operation that keeps no matrix of scores, as real devices choose.

    Without it meta tensors take the plain formula, whose scores would be most of what is counted.
    """
    original = F.scaled_dot_product_attention

    def attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if query.device.type != "meta":
            return original(query, key, value, *args, **kwargs)
        answer: Tensor = _flash(query, key, value, attn_mask=kwargs.get("attn_mask"))[0]
        return answer

    # Not by a mode of torch's: those are switched off inside of backward, where checkpointing computes once more.
    F.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = original


_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Of the forward pass, by shapes (B, heads, tokens, width)."""
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]


def _attention_backward_flops(_: Any, query: Any, key: Any, value: Any, *__: Any, **___: Any) -> int:
    """Four products against the forward pass's two; scores that a kernel computes once more are its own affair."""
    return 2 * int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]


def _product_flops(_: Any, left: Any, right: Any, *__: Any, **___: Any) -> int:
    """Of (..., m, k) times (..., k, n)."""
    return 2 * int(math.prod(left)) * int(right[-1])


_shaped: Any = shape_wrapper
# torch's own formulas, and what they leave out.
_FLOPS = flop_registry | {
    torch.ops.aten.addmm_: _shaped(_product_flops),
    torch.ops.aten.baddbmm_: _shaped(_product_flops),
    _flash: _shaped(_attention_flops),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _shaped(_attention_backward_flops),
}


@contextmanager
def counted() -> Iterator[Cost]:
    """Count what the block does; the cost grows while it runs."""
    cost = Cost()
    with meta_attention(), _Counter(cost):
        yield cost


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, cost: Cost) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.cost = cost
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {_storage(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        for tensor in made:
            if (storage := _storage(tensor)) not in given:
                self._hold(storage)
        self.cost.kernels += _computes(func)
        # torch's own FlopCounterMode would keep the graphs that checkpointing makes, and their memory with them.
        if (formula := _FLOPS.get(func.overloadpacket)) is not None:
            self.cost.flops += formula(*args, **(kwargs or {}), out_val=result)
        return result

    def _hold(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        size, cost = storage.nbytes(), self.cost
        cost.held_bytes += size
        cost.peak_bytes = max(cost.peak_bytes, cost.held_bytes)
        weakref.finalize(storage, _release, cost, size)


def _release(cost: Cost, size: int) -> None:
    cost.held_bytes -= size


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    return tensor.untyped_storage()


_ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}


def _computes(func: Any) -> bool:
    name = func._schema.name.removeprefix("aten::")
    if func.namespace != "aten" or name in _ALLOCATIONS:
        return False
    # A view shares its argument's memory without writing to it.
    aliases = [result.alias_info for result in func._schema.returns]
    return name != "_unsafe_view" and not any(alias is not None and not alias.is_write for alias in aliases)


@contextmanager
def saved_for_backward(*modules: nn.Module) -> Iterator[Cost]:
    """Count the bytes that autograd keeps of a forward pass: distinct storages that are no parameters.

    Args:
        modules: Whose parameters and buffers do not count.
    """
    cost = Cost()
    known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()
    for module in modules:
        for tensor in (*module.parameters(), *module.buffers()):
            known.add(_storage(tensor))

    def pack(tensor: Tensor) -> Tensor:
        storage = _storage(tensor)
        if storage not in known:
            known.add(storage)
            cost.held_bytes += storage.nbytes()
            cost.peak_bytes = cost.held_bytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield cost
