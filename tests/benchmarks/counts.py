"""Bytes that autograd keeps of a forward pass, and kernels that are called, for tests and benchmarks."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sdlora.estimate.meta_model import Cost


@contextmanager
def saved_for_backward(*modules: nn.Module) -> Iterator[Cost]:
    """Count the bytes of distinct storages that autograd keeps, without parameters and buffers of `modules`."""
    cost = Cost()
    known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()
    for module in modules:
        for tensor in (*module.parameters(), *module.buffers()):
            known.add(tensor.untyped_storage())

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage not in known:
            known.add(storage)
            cost.held_bytes += storage.nbytes()
            cost.peak_bytes = cost.held_bytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield cost


class KernelCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operations that compute, in `kernels`; views and bare allocations do not count."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kernels = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.kernels += _computes(func)
        return func(*args, **(kwargs or {}))


_ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}


def _computes(func: Any) -> bool:
    name = func._schema.name.removeprefix("aten::")
    if func.namespace != "aten" or name in _ALLOCATIONS:
        return False
    # A view shares its argument's memory without writing to it.
    aliases = [result.alias_info for result in func._schema.returns]
    return name != "_unsafe_view" and not any(alias is not None and not alias.is_write for alias in aliases)
