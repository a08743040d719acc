"""Drawing by the base model's distilled sibling, with the LoRA in training on it.

Held by a `PreviewRequest`; `sampler` enters it. Training is not touched: the LoRA's weights are copied each time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sdlora.lora.inject import Adapter, inject_state
from sdlora.models.base import BaseModel
from sdlora.models.sibling import SiblingParts


class Sibling:
    """A sibling's network, and the adapter whose weights it draws with.

    Args:
        parts: As `load_sibling` returns them.
        adapter: On the base model; its weights, strengths and whether it is on are those of the moment.
    """

    def __init__(self, parts: SiblingParts, adapter: Adapter) -> None:
        self._parts = parts
        self._adapter = adapter

    @contextmanager
    def drawing(self, base: BaseModel) -> Iterator[None]:
        """Let the base model draw by the sibling inside the block; one of both networks is on the device at a time."""
        layers = {path: layer for path, layer in self._adapter.layers.items() if layer.enabled}
        state = {path: weights for path, weights in self._adapter.state().items() if path in layers}
        copy = inject_state(self._parts.network, state, timestep_rank=self._adapter.timestep_rank)
        for path, layer in copy.layers.items():
            layer.requires_grad_(False)
            layer.place(base.device)  # blocks that visit the device leave adapters where they are
            layer.strength = layers[path].strength
        try:
            with base.drawn_by(*self._parts):
                yield
        finally:
            copy.remove()
