"""Putting adapters into a base's networks, and taking them out again.

Shapes: B batch, i in, o out, r rank, k kernel.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sdlora.common import seeds
from sdlora.errors import ConfigError
from sdlora.lora.init import Start, starting_factors
from sdlora.lora.layers import LoraConv2d, LoraLayer, LoraLinear
from sdlora.lora.quantize import QuantizedLinear, num_weights
from sdlora.lora.targets import TEXT_ENCODER, by_prefix, network_of, target_of
from sdlora.lora.timestep_rank import TimestepRank, rank_mask, watch_timesteps


@dataclass(frozen=True)
class LoraWeights:
    """One module's trained numbers, all float32.

    Attributes:
        down: A, (r, i) or (r, i, k, k).
        up: B, (o, r) or (o, r, 1, 1).
        alpha: Numerator of the scale alpha / r.
        magnitude: DoRA's magnitudes, (o,) or (1, o, 1, 1), or None.
        start: The frozen A0 and B0 whose product is subtracted, or None.
    """

    down: Tensor
    up: Tensor
    alpha: float
    magnitude: Tensor | None = None
    start: tuple[Tensor, Tensor] | None = None


LoraState = dict[str, LoraWeights]
"""Module path, as `sdlora.lora.targets` writes it, to its weights."""


@dataclass(frozen=True)
class Form:
    """What kind of adapter it is, apart from rank and alpha.

    Attributes:
        target_ranks: Another rank for the layers of some targets.
        target_alphas: Another alpha for the layers of some targets.
        rslora: Scale by alpha / sqrt(r) instead of alpha / r (Kalajdzievski 2312.03732, equation 3).
        dora: Train magnitudes too.
        dropout: The share of inputs set to zero inside `Adapter.dropping`, in [0, 1).
        start: Where A and B start.
        timestep_rank: Fewer ranks of the UNet's layers at high noise, or None.
    """

    target_ranks: Mapping[str, int] = field(default_factory=dict)
    target_alphas: Mapping[str, float] = field(default_factory=dict)
    rslora: bool = False
    dora: bool = False
    dropout: float = 0.0
    start: Start = "gaussian"
    timestep_rank: TimestepRank | None = None


class Adapter:
    """All adapter layers of a base; made by `inject`.

    Args:
        networks: By what their paths begin with; the UNet's calls set the ranks in use if there is a `timestep_rank`.
        layers: The layers by path.
        timestep_rank: Fewer ranks of the UNet's layers at high noise, or None.
    """

    def __init__(
        self,
        networks: Mapping[str, nn.Module],
        layers: dict[str, LoraLayer],
        timestep_rank: TimestepRank | None = None,
    ) -> None:
        self._networks = networks
        self.layers = layers
        self._watch: RemovableHandle | None = None
        if timestep_rank is not None:
            self._watch = watch_timesteps(networks[""], lambda timesteps: self._mask_ranks(timesteps, timestep_rank))

    def down_parameters(self) -> list[nn.Parameter]:
        """Every A, in the networks' order."""
        return [layer.down for layer in self.layers.values()]

    def up_parameters(self) -> list[nn.Parameter]:
        """Every B, in the networks' order."""
        return [layer.up for layer in self.layers.values()]

    def magnitude_parameters(self) -> list[nn.Parameter]:
        """Every magnitude of DoRA, in the networks' order."""
        return [layer.magnitude for layer in self.layers.values() if layer.magnitude is not None]

    def parameters(self) -> list[nn.Parameter]:
        """Every A, then every B, then every magnitude."""
        return self.down_parameters() + self.up_parameters() + self.magnitude_parameters()

    def num_parameters(self) -> int:
        """How many numbers are trained."""
        return sum(parameter.numel() for parameter in self.parameters())

    def num_base_parameters(self) -> int:
        """How many numbers the adapted networks have themselves; text encoders count where they are adapted."""
        networks = [network for prefix, network in self._networks.items() if not prefix or self.adapts_text]
        return sum(map(num_weights, networks)) - self.num_parameters()

    def starts(self) -> list[Tensor]:
        """Every frozen A0 and B0, in the networks' order; they are as they were drawn, to be saved with a run."""
        pairs = [(layer.down_start, layer.up_start) for layer in self.layers.values()]
        return [tensor for pair in pairs for tensor in pair if tensor is not None]

    @property
    def adapts_text(self) -> bool:
        """Whether any layer is in a text encoder, so that captions have no fixed states."""
        return any(path.startswith(TEXT_ENCODER) for path in self.layers)

    def state(self) -> LoraState:
        """A copy of the weights, float32 on the CPU."""

        def copy(tensor: Tensor) -> Tensor:
            return tensor.detach().float().cpu().clone()

        state: LoraState = {}
        for path, layer in self.layers.items():
            magnitude, start = layer.magnitude, None
            if layer.down_start is not None and layer.up_start is not None:
                start = (copy(layer.down_start), copy(layer.up_start))
            kept = None if magnitude is None else copy(magnitude)
            state[path] = LoraWeights(copy(layer.down), copy(layer.up), layer.alpha, kept, start)
        return state

    @torch.no_grad()
    def load(self, state: LoraState) -> None:
        """Take over weights of the same modules, ranks and kind.

        Raises:
            ConfigError: The modules, their shapes or their kind differ.
        """
        if _shapes(self.state()) != _shapes(state):
            raise ConfigError("These LoRA weights belong to other modules, or have another rank, than this adapter.")
        for path, layer in self.layers.items():
            weights = state[path]
            if weights.start is not None:
                layer.start_from(*weights.start)
            layer.down.copy_(weights.down)
            layer.up.copy_(weights.up)
            if layer.magnitude is not None and weights.magnitude is not None:
                layer.magnitude.copy_(weights.magnitude)
            layer.alpha = weights.alpha

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

    @contextmanager
    def dropping(self, seed: int, exposures: Sequence[tuple[str, int]]) -> Iterator[None]:
        """Dropout for the length of the block, for batches of these samples; outside of it nothing is dropped.

        Args:
            seed: The run's seed.
            exposures: (example, exposure) of every sample; a sample's zeros are a function of both and of the module.
        """
        dropped = {path: layer for path, layer in self.layers.items() if layer.dropout > 0}
        for path, layer in dropped.items():
            layer.dropout_seeds = tuple(seeds.derive(seed, "dropout", path, *exposure) for exposure in exposures)
        try:
            yield
        finally:
            for layer in dropped.values():
                layer.dropout_seeds = ()

    def remove(self) -> None:
        """Put the original modules back into the networks."""
        if self._watch is not None:
            self._watch.remove()
        for path, layer in self.layers.items():
            _replace(self._networks, path, layer.base)

    def _mask_ranks(self, timesteps: Tensor, setting: TimestepRank) -> None:
        layers = [layer for path, layer in self.layers.items() if not path.startswith(TEXT_ENCODER)]
        masks = {rank: rank_mask(timesteps, rank, setting) for rank in {layer.rank for layer in layers}}
        for layer in layers:
            layer.rank_mask = masks[layer.rank]


def inject(
    unet: nn.Module,
    paths: Sequence[str],
    rank: int,
    alpha: float,
    seed: int,
    *,
    form: Form | None = None,
    text_encoders: Sequence[nn.Module] = (),
) -> Adapter:
    """Freeze a base's networks and put a fresh adapter on some of their layers.

    Args:
        unet: Changed in place.
        paths: Module paths, as `find_targets` gives them.
        rank: r of every layer whose target has no other.
        alpha: alpha of every layer whose target has no other.
        seed: The run's seed; each start is a function of it and of the module's path.
        form: What kind of adapter; plain LoRA if None.
        text_encoders: Changed in place where paths name their modules.

    Raises:
        ConfigError: The start needs more singular values than a layer has.
    """
    form = form or Form()
    networks = _frozen(unet, text_encoders)
    layers: dict[str, LoraLayer] = {}
    for path in paths:
        target = target_of(path) or ""
        r, numerator = form.target_ranks.get(target, rank), form.target_alphas.get(target, alpha)
        # Files know alpha / r alone, so that rsLoRA is an alpha larger by sqrt(r).
        numerator = numerator * math.sqrt(r) if form.rslora else numerator
        generator = seeds.generator(seed, "lora down", path)
        layer = _wrap(_module(networks, path), r, numerator, generator)
        if form.start != "gaussian":
            drawn = seeds.generator(seed, "lora start", path)
            layer.start_from(*starting_factors(form.start, layer.base.weight, r, layer.scale, generator=drawn))
        if form.dora:
            layer.add_magnitude()
        layer.dropout = form.dropout
        _replace(networks, path, layer)
        layers[path] = layer
    return Adapter(networks, layers, form.timestep_rank)


def inject_state(
    unet: nn.Module,
    state: LoraState,
    *,
    text_encoders: Sequence[nn.Module] = (),
    timestep_rank: TimestepRank | None = None,
) -> Adapter:
    """Put existing weights on a base; ranks and alphas may differ from module to module."""
    networks = _frozen(unet, text_encoders)
    layers: dict[str, LoraLayer] = {}
    for path, weights in state.items():
        layer = _wrap(_module(networks, path), weights.down.shape[0], weights.alpha)
        if weights.start is not None:
            layer.start_from(*weights.start)
        if weights.magnitude is not None:
            layer.add_magnitude()
        _replace(networks, path, layer)
        layers[path] = layer
    adapter = Adapter(networks, layers, timestep_rank)
    adapter.load(state)
    return adapter


def _shapes(state: LoraState) -> dict[str, tuple[object, ...]]:
    return {
        path: (w.down.shape, w.up.shape, w.magnitude is None, w.start is None) for path, w in state.items()
    }  # fmt: skip


def _frozen(unet: nn.Module, text_encoders: Sequence[nn.Module]) -> dict[str, nn.Module]:
    """The networks by prefix, none of their own weights trained."""
    networks = by_prefix(unet, text_encoders)
    for network in networks.values():
        network.requires_grad_(False)
    return networks


def _wrap(module: nn.Module, rank: int, alpha: float, generator: torch.Generator | None = None) -> LoraLayer:
    if isinstance(module, nn.Conv2d):
        assert module.groups == 1, "no convolution among the targets has groups"
        return LoraConv2d(module, rank, alpha, generator=generator)
    assert isinstance(module, nn.Linear | QuantizedLinear), f"{type(module).__name__} cannot be adapted"
    return LoraLinear(module, rank, alpha, generator=generator)


def _module(networks: Mapping[str, nn.Module], path: str) -> nn.Module:
    prefix = _prefix(path)
    return networks[prefix].get_submodule(path.removeprefix(prefix))


def _replace(networks: Mapping[str, nn.Module], path: str, module: nn.Module) -> None:
    prefix = _prefix(path)
    parent, _, name = path.removeprefix(prefix).rpartition(".")
    setattr(networks[prefix].get_submodule(parent), name, module)


def _prefix(path: str) -> str:
    network = network_of(path)
    return "" if network == "unet" else f"{network}."
