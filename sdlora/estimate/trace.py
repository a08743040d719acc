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

    def hold(self, num_bytes: int) -> None:
        """Count a storage that was made or, below 0, released."""
        self.held_bytes += num_bytes
        self.peak_bytes = max(self.peak_bytes, self.held_bytes)


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


# Operations by the shapes of their arguments; mypy knows no types of these functions.
_by_shape: Any = shape_wrapper
_attention_flops: Any = sdpa_flop_count
# torch's own formulas, and those that it lacks.
_FLOPS = flop_registry | {
    # (..., m, k) times (..., k, n)
    **dict.fromkeys(
        (torch.ops.aten.addmm_, torch.ops.aten.baddbmm_),
        _by_shape(lambda _, left, right, *__, **___: 2 * math.prod(left) * right[-1]),
    ),
    # (B, heads, tokens, width)
    _flash: _by_shape(lambda query, key, value, *_, **__: _attention_flops(query, key, value)),
    # Four products, the forward pass has two; scores that a kernel recomputes do not count.
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _by_shape(
        lambda _, query, key, value, *__, **___: 2 * _attention_flops(query, key, value)
    ),
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
        given = {leaf.untyped_storage() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if not isinstance(leaf, Tensor):
                continue
            storage = leaf.untyped_storage()
            if storage not in given and storage not in self._known:
                self._known.add(storage)
                self.cost.hold(storage.nbytes())
                weakref.finalize(storage, self.cost.hold, -storage.nbytes())
        # torch's own FlopCounterMode would keep the graphs that checkpointing makes, and their memory with them.
        if (formula := _FLOPS.get(func.overloadpacket)) is not None:
            self.cost.flops += formula(*args, **(kwargs or {}), out_val=result)
        return result
