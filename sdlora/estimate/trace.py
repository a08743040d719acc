"""The cost of a piece of torch code, counted without computing it: bytes and floating-point operations.

On the meta device tensors have shapes and no values, so that any model is counted on any machine.
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
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_flop_count, shape_wrapper


@dataclass
class Cost:
    """The cost so far.

    Attributes:
        peak_bytes: The most that new storages held at once.
        held_bytes: What they hold now.
        flops: Of matrix products, convolutions and attention; a multiplication and an addition count as two.
    """

    peak_bytes: int = 0
    held_bytes: int = 0
    flops: int = 0


@contextmanager
def meta_attention() -> Iterator[None]:
    """Compute attention on the meta device by the kernel that keeps no matrix of scores, as real devices do.

    Otherwise meta tensors take the plain formula, whose scores would be most of what is counted.
    """
    original = F.scaled_dot_product_attention

    def attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if query.device.type != "meta":
            return original(query, key, value, *args, **kwargs)
        output: Tensor = _flash(query, key, value, attn_mask=kwargs.get("attn_mask"))[0]
        return output

    # A torch mode would not do: modes are off inside backward, where gradient checkpointing computes again.
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
    """Four products, the forward pass has two; scores that a kernel recomputes do not count."""
    return 2 * int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]


def _product_flops(_: Any, left: Any, right: Any, *__: Any, **___: Any) -> int:
    """Of (..., m, k) times (..., k, n)."""
    return 2 * int(math.prod(left)) * int(right[-1])


_shaped: Any = shape_wrapper
# torch's own formulas, and those that it lacks.
_FLOPS = flop_registry | {
    torch.ops.aten.addmm_: _shaped(_product_flops),
    torch.ops.aten.baddbmm_: _shaped(_product_flops),
    _flash: _shaped(_attention_flops),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _shaped(_attention_backward_flops),
}


@contextmanager
def counted() -> Iterator[Cost]:
    """Count the cost of the block; it grows while the block runs."""
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
