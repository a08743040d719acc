"""Frozen blocks that wait in the host's memory and visit the device while they compute, one ahead of the others.

A base model of which `base.offload = "blocks"` is asked has one for its network, and one for a language model that
reads its captions. What is trained never moves. At most two blocks are on the device: the one that computes, and the
one that came after it the last time, which is copied meanwhile. Outside its visits a block's weights lie on the host,
where whatever reads them finds them.

Source: Rhu et al. 1602.08124, section 3, on fetching ahead over a second stream.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from sdlora.lora.layers import LoraLayer
from sdlora.lora.quantize import Packed

_ALIGNED_BYTES = 256  # as CUDA's allocator aligns, so that kernels take the same paths


def blocks_in(network: nn.Module, lists: Sequence[str]) -> list[nn.Module]:
    """A network's blocks: the members of its module lists of these names."""
    found = [module for path, module in network.named_modules() if path.rpartition(".")[2] in lists]
    return [block for one in found if isinstance(one, nn.ModuleList) for block in one]


def visiting_bytes(network: nn.Module, lists: Sequence[str]) -> tuple[int, int]:
    """Bytes of a network's blocks, and of the two largest, which is the most that are on the device at once."""
    sizes = sorted((sum(t.nbytes for t in _frozen(block)) for block in blocks_in(network, lists)), reverse=True)
    return sum(sizes), sum(sizes[:2])


class BlockOffload:
    """Keeps a frozen network's blocks on the host, and the rest of it on the device.

    A block is fetched before its forward pass and before its backward pass, which needs the weights again; autograd
    runs backward in the reverse order of the forward pass, so that a block is never needed after the next has begun.
    On a CPU blocks move in the same way, between two places of the same memory.

    Args:
        network: On the CPU, frozen, of its final type; some parameter outside its blocks comes first.
        lists: The names of the module lists that hold its blocks.
        device: Where it computes.
    """

    def __init__(self, network: nn.Module, lists: Sequence[str], device: torch.device) -> None:
        self._network, self._device = network, device
        self._blocks = [_Block(module) for module in blocks_in(network, lists)]
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._active: _Block | None = None
        self._coming: _Block | None = None
        # The last two blocks that were used, and what was used after each such pair, which tells the direction.
        self._last: tuple[_Block | None, _Block | None] = (None, None)
        self._after: dict[tuple[_Block | None, _Block | None], _Block] = {}
        for block in self._blocks:
            self._watch(block)
        self.lay_out()

    @property
    def resident_bytes(self) -> int:
        """Bytes of blocks that are on the device now."""
        return sum(block.place.untyped_storage().nbytes() for block in self._blocks)

    def lay_out(self) -> None:
        """Move the weights of all blocks to the host again, after they were replaced."""
        with torch.no_grad():
            for block in self._blocks:
                block.lay_out(self._device)
        self._active = self._coming = None

    def move(self, device: torch.device) -> None:
        """Move all but the blocks to a device; those come when they are used, and leave it with the rest."""
        if device != self._device:
            self.release()
        inside = {id(module) for block in self._blocks for module in block.module.modules()}
        for module in self._network.modules():
            if id(module) not in inside:
                for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                    if not tensor.requires_grad and tensor.device != device:
                        tensor.data = tensor.data.to(device)

    def release(self) -> None:
        """Take all blocks off the device."""
        for block in filter(None, (self._active, self._coming)):
            block.leave(self._device)
        self._active = self._coming = None

    def _watch(self, block: _Block) -> None:
        def before(*_: Any) -> None:
            self._use(block)

        def after(_: nn.Module, __: Any, output: Any) -> None:
            if torch.is_grad_enabled():
                for tensor in tree_leaves(output):
                    if isinstance(tensor, Tensor) and tensor.requires_grad:
                        # It runs before the backward pass of what made the tensor.
                        tensor.register_hook(before)  # type: ignore[no-untyped-call]

        block.module.register_forward_pre_hook(before, prepend=True)
        block.module.register_forward_hook(after)

    def _use(self, block: _Block) -> None:
        """Have a block on the device, and the one on its way that was used next the last time."""
        if block is self._active:
            return
        active, coming, self._active, self._coming = self._active, self._coming, None, None
        if active is not None:
            active.leave(self._device)
        if coming is not None and coming is not block:
            coming.leave(self._device)
        if coming is not block:
            block.fetch(self._copies)
        block.enter(self._device)
        self._active = block
        self._after[self._last] = block
        self._last = (self._last[1], block)
        following = self._after.get(self._last)
        if following is not None and following is not block:
            following.fetch(self._copies)
            self._coming = following


class _Block:
    """A block's weights at their two places; `place`, on the device, has no memory while they are not there."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.host = self.place = torch.empty(0, dtype=torch.uint8)
        # Each weight, on the host and on the device.
        self._tensors: list[tuple[Tensor, Tensor, Tensor]] = []
        self._arrived: torch.cuda.Event | None = None

    def lay_out(self, device: torch.device) -> None:
        """Copy the weights to the host, all into one place, wherever they are."""
        parts = list(_by_storage(_frozen(self.module)))
        sizes = [-(-(high - low) // _ALIGNED_BYTES) * _ALIGNED_BYTES for _, low, high in parts]
        starts = list(accumulate(sizes, initial=0))
        is_cuda = device.type == "cuda"
        host = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=is_cuda)
        place = torch.empty(starts[-1], dtype=torch.uint8, device=device)
        self._tensors = []
        for start, (tensors, low, high) in zip(starts, parts, strict=False):
            storage = tensors[0].untyped_storage()
            host[start : start + high - low] = _bytes_of(storage)[low:high]
            for tensor in tensors:
                offset = start + _first_byte(tensor) - low
                self._tensors.append((tensor, _view(host, offset, tensor), _view(place, offset, tensor)))
        self.host, self.place, self._arrived = host, place, None
        self.leave(device)

    def fetch(self, copies: torch.cuda.Stream | None) -> None:
        """Begin to copy the weights to the device; on a CUDA device over a stream of its own."""
        self.place.untyped_storage().resize_(self.place.nbytes)
        if copies is None:
            self.place.copy_(self.host)
            return
        # The memory may have been another block's, whose last computation must be over.
        copies.wait_stream(torch.cuda.current_stream(copies.device))
        with torch.cuda.stream(copies):
            self.place.copy_(self.host, non_blocking=True)
            self._arrived = copies.record_event()

    def enter(self, device: torch.device) -> None:
        """Compute with the weights on the device, once they are there."""
        self._wait(device)
        for tensor, _, there in self._tensors:
            tensor.data = there

    def leave(self, device: torch.device) -> None:
        """Go back to the weights on the host, and give the device's memory back."""
        self._wait(device)
        for tensor, here, _ in self._tensors:
            tensor.data = here
        # What autograd has saved are views of this storage, which has its weights again when they are used.
        self.place.untyped_storage().resize_(0)

    def _wait(self, device: torch.device) -> None:
        if self._arrived is not None:
            torch.cuda.current_stream(device).wait_event(self._arrived)
            self._arrived = None


def _frozen(block: nn.Module) -> list[Tensor]:
    """The frozen tensors of a block, each once; an adapter's own, frozen ones too, belong to the adapter."""
    found: dict[int, Tensor] = {}
    own: list[Tensor | None]
    for module in block.modules():
        if isinstance(module, LoraLayer):
            shared = getattr(module, "shared", None)
            stacked = None if shared is None else shared.weight
            own = [stacked.codes, stacked.scales] if isinstance(stacked, Packed) else [stacked]
        else:
            own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        found |= {id(tensor): tensor for tensor in own if tensor is not None and not tensor.requires_grad}
    return list(found.values())


def _by_storage(tensors: Sequence[Tensor]) -> Iterator[tuple[list[Tensor], int, int]]:
    """Tensors that share memory, with the first byte that they have of it, and the byte behind their last."""
    groups: dict[int, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.untyped_storage().data_ptr(), []).append(tensor)
    for members in groups.values():
        lows = [_first_byte(tensor) for tensor in members]
        highs = [low + _extent(tensor) for low, tensor in zip(lows, members, strict=True)]
        yield members, min(lows), max(highs)


def _first_byte(tensor: Tensor) -> int:
    """Where a tensor begins in its storage."""
    return int(tensor.storage_offset()) * tensor.itemsize


def _extent(tensor: Tensor) -> int:
    """Bytes from a tensor's first element to behind its last."""
    steps = ((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (1 + sum(steps)) * tensor.itemsize if tensor.numel() else 0


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _view(flat: Tensor, offset: int, like: Tensor) -> Tensor:
    """A tensor of another's type and shape in memory that holds bytes, from one of them on."""
    empty = torch.empty(0, dtype=like.dtype, device=flat.device)
    storage = flat.untyped_storage()
    return empty.set_(storage, offset // like.itemsize, like.shape, like.stride())
