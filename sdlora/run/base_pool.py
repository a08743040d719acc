"""What one process keeps from run to run: a base, handed out only while nothing is left of the run before."""

from __future__ import annotations

import torch
from accelerate.state import AcceleratorState, GradientState

from sdlora.config.schema import RunConfig
from sdlora.models.base import BaseModel
from sdlora.run.setup import fresh_base


class KeptBase:
    """Gives runs their base, and loads it again only if another one is asked for.

    Attributes:
        num_loads: How often a base was loaded.
    """

    def __init__(self) -> None:
        self.num_loads = 0
        self._key: object = None
        self._base: BaseModel | None = None
        self._modules: list[object] = []

    def __call__(self, config: RunConfig, device: torch.device, dtype: torch.dtype) -> BaseModel:
        """The base of a configuration; see `sdlora.run.setup.fresh_base`."""
        key = (config.base, config.data.max_token_windows, device, dtype, config.loss.zero_terminal_snr)
        # A run that failed half-way into putting its adapter in leaves other modules, or hooks, behind.
        if self._base is None or key != self._key or _modules(self._base) != self._modules:
            self._base = None  # before the next one is loaded, so that never two of them are in memory
            self._base = fresh_base(config, device, dtype)
            self._key, self._modules = key, _modules(self._base)
            self.num_loads += 1
        return self._base


def _modules(base: BaseModel) -> list[object]:
    """Which modules a base's networks consist of, and which hooks hang on them."""
    return [
        (name, id(module), *module._forward_hooks, *module._forward_pre_hooks)
        for network in (base.unet, *base.text_encoders)
        for name, module in network.named_modules()
    ]


def forget_accelerator() -> None:
    """Let the next run choose its own precision: Accelerate keeps the first one of a process for good."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
