"""The base model that a process keeps between runs and previews.

Used by workers of a batch and by the studio, which would otherwise load the same base again and again.
"""

from __future__ import annotations

import torch
from accelerate.state import AcceleratorState, GradientState

from sdlora.config.schema import RunConfig
from sdlora.models.base import BaseModel
from sdlora.run.setup import fresh_base


class BasePool:
    """Keeps the last base loaded; loads again for another base, or if an adapter was left in it."""

    def __init__(self) -> None:
        self._key: object = None
        self._base: BaseModel | None = None
        self._modules: list[object] = []

    def __call__(self, config: RunConfig, device: torch.device, dtype: torch.dtype) -> BaseModel:
        """The base of a configuration; see `sdlora.run.setup.fresh_base`."""
        key = (config.base, config.data.max_token_windows, device, dtype, config.loss.zero_terminal_snr)
        # A run that failed while its adapter was being injected leaves other modules, or hooks, behind.
        if self._base is None or key != self._key or _modules(self._base) != self._modules:
            self._base = None  # before the next one is loaded, so that memory never holds two
            self._base = fresh_base(config, device, dtype)
            self._key, self._modules = key, _modules(self._base)
        return self._base


def _modules(base: BaseModel) -> list[object]:
    """The modules of a base's networks, with their hooks."""
    return [
        (name, id(module), *module._forward_hooks, *module._forward_pre_hooks)
        for network in (base.unet, *base.text_encoders)
        for name, module in network.named_modules()
    ]


def forget_accelerator() -> None:
    """Let the next run choose its own precision; Accelerate keeps that of a process's first run."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
