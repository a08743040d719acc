"""Putting adapters into a network, and taking them out again.

Floor 2. Shapes: i in, o out, r rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sdlora import seeds
from sdlora.errors import ConfigError
from sdlora.lora.layers import LoraLinear


@dataclass(frozen=True)
class LoraWeights:
    """One module's trained numbers.

    Attributes:
        down: A, (r, i) float32.
        up: B, (o, r) float32.
        alpha: Numerator of the scale alpha / r.
    """

    down: Tensor
    up: Tensor
    alpha: float


LoraState = dict[str, LoraWeights]
"""Module path in the UNet to its weights."""


class Adapter:
    """All adapter layers of one network; made by `inject`."""

    def __init__(self, network: nn.Module, layers: dict[str, LoraLinear]) -> None:
        self._network = network
        self.layers = layers

    def down_parameters(self) -> list[nn.Parameter]:
        """Every A, in the network's order."""
        return [layer.down for layer in self.layers.values()]

    def up_parameters(self) -> list[nn.Parameter]:
        """Every B, in the network's order."""
        return [layer.up for layer in self.layers.values()]

    def parameters(self) -> list[nn.Parameter]:
        """Every A, then every B."""
        return self.down_parameters() + self.up_parameters()

    def num_parameters(self) -> int:
        """How many numbers are trained."""
        return sum(parameter.numel() for parameter in self.parameters())

    def state(self) -> LoraState:
        """A copy of the weights, float32 on the CPU."""
        return {
            path: LoraWeights(
                layer.down.detach().float().cpu().clone(), layer.up.detach().float().cpu().clone(), layer.alpha
            )
            for path, layer in self.layers.items()
        }

    @torch.no_grad()
    def load(self, state: LoraState) -> None:
        """Take over weights of the same modules and ranks.

        Raises:
            ConfigError: The modules or their shapes differ.
        """
        shapes = {path: (layer.down.shape, layer.up.shape) for path, layer in self.layers.items()}
        if shapes != {path: (weights.down.shape, weights.up.shape) for path, weights in state.items()}:
            raise ConfigError("These LoRA weights belong to other modules, or have another rank, than this adapter.")
        for path, layer in self.layers.items():
            layer.down.copy_(state[path].down)
            layer.up.copy_(state[path].up)
            layer.alpha = state[path].alpha

    def set_strength(self, strength: float) -> None:
        """Scale what the adapter adds: 0 is the base, 1 what was trained."""
        for layer in self.layers.values():
            layer.strength = strength

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The plain base for the length of the block; afterwards every layer is as it was before."""
        before = {path: layer.enabled for path, layer in self.layers.items()}
        for layer in self.layers.values():
            layer.enabled = False
        try:
            yield
        finally:
            for path, layer in self.layers.items():
                layer.enabled = before[path]

    def remove(self) -> None:
        """Put the original modules back into the network."""
        for path, layer in self.layers.items():
            _replace(self._network, path, layer.base)


def inject(network: nn.Module, paths: Sequence[str], rank: int, alpha: float, seed: int) -> Adapter:
    """Freeze a network and put a fresh adapter on some of its linear layers.

    Args:
        network: A UNet, changed in place.
        paths: Module paths, as `find_targets` gives them.
        rank: r of every layer.
        alpha: alpha of every layer.
        seed: The run's seed; each A is a function of it and of the module's path.
    """
    network.requires_grad_(False)
    layers = {path: _wrap(network, path, rank, alpha, seed) for path in paths}
    return Adapter(network, layers)


def inject_state(network: nn.Module, state: LoraState) -> Adapter:
    """Put existing weights on a network; ranks and alphas may differ from module to module."""
    network.requires_grad_(False)
    layers = {path: _wrap(network, path, weights.down.shape[0], weights.alpha, 0) for path, weights in state.items()}
    adapter = Adapter(network, layers)
    adapter.load(state)
    return adapter


def _wrap(network: nn.Module, path: str, rank: int, alpha: float, seed: int) -> LoraLinear:
    module = network.get_submodule(path)
    assert isinstance(module, nn.Linear), f"{path} is a {type(module).__name__}; only linear layers are targets"
    layer = LoraLinear(module, rank, alpha, generator=seeds.generator(seed, "lora down", path))
    _replace(network, path, layer)
    return layer


def _replace(network: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(network.get_submodule(parent), name, module)
