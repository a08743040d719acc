"""Targets, the layers that get an adapter, and injection: put its layers into a base model, and take them out again.

A path is a module's name in the UNet, or in a text encoder behind "text_encoder." or "text_encoder_2.". The trainer
trains an `Adapter`, `lora_files` writes and reads its `LoraState`.
Shapes: B batch, i in, o out, r rank, k kernel.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sdlora.common import seeds
from sdlora.common.selectors import Blocks
from sdlora.errors import ConfigError
from sdlora.lora.init import Init, initial_factors
from sdlora.lora.layers import DoraConv2d, DoraLayer, DoraLinear, LoraConv2d, LoraLayer, LoraLinear
from sdlora.lora.limits import dropping
from sdlora.lora.quantize import QuantizedLinear, num_weights
from sdlora.lora.timestep_rank import TimestepRank, rank_mask, watch_timesteps

NETWORKS = ("unet", "text_encoder", "text_encoder_2")
TEXT_ENCODER = "text_encoder"  # prefix of all text encoders' paths, and of none in a UNet
_ATTENTION = r"(to_q|to_k|to_v|to_out\.0)"
TARGETS: dict[str, re.Pattern[str]] = {
    "cross_attention": re.compile(rf".*\.attn2\.{_ATTENTION}"),
    "self_attention": re.compile(rf".*\.attn1\.{_ATTENTION}"),
    # Of transformers, whose text and image attend to each other in one sequence; single blocks fuse their MLP with it.
    "attention": re.compile(
        rf"layers\.\d+\.attention\.{_ATTENTION}|transformer_blocks\.\d+\.attn\.({_ATTENTION}|add_[qkv]_proj|to_add_out)|"
        r"single_transformer_blocks\.\d+\.attn\.(to_qkv_mlp_proj|to_out)"
    ),
    "mlp": re.compile(
        r".*\.ff\.net\.(0\.proj|2)|layers\.\d+\.feed_forward\.w[123]|"
        r"transformer_blocks\.\d+\.ff(_context)?\.linear_(in|out)"
    ),
    "projection": re.compile(r".*\.attentions\.\d+\.(proj_in|proj_out)"),
    "conv": re.compile(r".*\.(resnets\.\d+\.(conv1|conv2|conv_shortcut)|(down|up)samplers\.\d+\.conv)"),
    "text_encoder": re.compile(rf"{TEXT_ENCODER}.*\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])"),
}


def target_of(path: str) -> str | None:
    """The name of the target that a module path belongs to, or None."""
    return next((name for name, pattern in TARGETS.items() if pattern.fullmatch(path)), None)


def network_of(path: str) -> str:
    """The network of a module path, one of `NETWORKS`."""
    return next((name for name in NETWORKS[1:] if path.startswith(f"{name}.")), "unet")


def by_prefix(unet: nn.Module, text_encoders: Sequence[nn.Module] = ()) -> dict[str, nn.Module]:
    """Networks by the prefix of their modules' paths, "" for the UNet."""
    return {"": unet} | {f"{name}.": encoder for name, encoder in zip(NETWORKS[1:], text_encoders, strict=False)}


def adaptable(unet: nn.Module, text_encoders: Sequence[nn.Module] = ()) -> list[str]:
    """The paths of all linear and convolution layers, in the networks' order."""
    return [
        prefix + path
        for prefix, network in by_prefix(unet, text_encoders).items()
        for path, module in network.named_modules()
        if isinstance(module, nn.Linear | QuantizedLinear | nn.Conv2d)
    ]


def find_targets(unet: nn.Module, names: Sequence[str], text_encoders: Sequence[nn.Module] = ()) -> list[str]:
    """The paths of all layers that selectors are of, without those of selectors behind a "!", in the networks' order.

    Only layers of a kind in `TARGETS` can be selected.

    Raises:
        ConfigError: A selector matches no layer of this base, or nothing is left.
    """
    layers = [path for path in adaptable(unet, text_encoders) if target_of(path) is not None]
    blocks = blocks_of(unet)
    found = {
        name: [path for path in layers if blocks.selects(name.removeprefix("!"), path, target_of(path))]
        for name in names
    }
    if empty := [name for name, paths in found.items() if not paths]:
        present = [name for name in TARGETS if any(TARGETS[name].fullmatch(path) for path in layers)]
        raise ConfigError(
            f"lora.targets: {', '.join(map(repr, empty))} matches no layer of this base model; "
            f"its targets are: {', '.join(present) or 'none'}. Their paths are like {_examples(layers)}."
        )
    wanted = {path for name, paths in found.items() if not name.startswith("!") for path in paths}
    wanted -= {path for name, paths in found.items() if name.startswith("!") for path in paths}
    if names and not wanted:
        raise ConfigError(f"lora.targets: {', '.join(map(repr, names))} leave no layer to train. Exclude less.")
    return [path for path in layers if path in wanted]


def blocks_of(unet: nn.Module) -> Blocks:
    """How a network's blocks are numbered."""
    return Blocks.of(f"{path}." for path, _ in unet.named_modules())


def _examples(layers: Sequence[str]) -> str:
    """A few paths of different kinds."""
    return ", ".join(map(repr, list({target_of(path): path for path in layers}.values())[:2])) or "none"


@dataclass(frozen=True)
class LoraWeights:
    """One module's weights, all float32."""

    down: Tensor  # A, (r, i) or (r, i, k, k)
    up: Tensor  # B, (o, r) or (o, r, 1, 1)
    alpha: float  # numerator of the scale alpha / r
    magnitude: Tensor | None = None  # DoRA's magnitudes, (o,) or (1, o, 1, 1), or None
    initial: tuple[Tensor, Tensor] | None = None  # the frozen A0 and B0 of the same shapes, whose product is subtracted


LoraState = dict[str, LoraWeights]
"""Module path, as `sdlora.lora.inject` writes it, to its weights."""


@dataclass(frozen=True)
class AdapterSpec:
    """The kind of an adapter, apart from rank and alpha."""

    target_ranks: Mapping[str, int] = field(default_factory=dict)  # by selector, where they differ from the adapter's
    target_alphas: Mapping[str, float] = field(default_factory=dict)  # by selector, where they differ
    rslora: bool = False  # scale by alpha / sqrt(r) instead of alpha / r (Kalajdzievski 2312.03732, equation 3)
    dora: bool = False  # train magnitudes as well
    dropout: float = 0.0  # share of inputs that is zeroed inside `Adapter.dropping`, in [0, 1)
    rank_dropout: float = 0.0  # share of ranks that is left out there, in [0, 1)
    module_dropout: float = 0.0  # share of layers that is left out there, in [0, 1)
    init: Init = "gaussian"  # how A and B are initialised
    timestep_rank: TimestepRank | None = None  # fewer ranks of the UNet's layers at high noise, or None


class Adapter:
    """All adapter layers of a base; made by `inject`.

    Args:
        networks: By the prefix of their module paths, "" for the UNet.
        layers: By module path.
        timestep_rank: Fewer ranks of the UNet's layers at high noise, or None; every call of the UNet sets them.
    """

    def __init__(
        self,
        networks: Mapping[str, nn.Module],
        layers: dict[str, LoraLayer],
        timestep_rank: TimestepRank | None = None,
    ) -> None:
        self._networks = networks
        self.layers = layers
        self.blocks = blocks_of(networks[""])
        self.timestep_rank = timestep_rank
        self._watch: RemovableHandle | None = None
        if timestep_rank is not None:
            self._watch = watch_timesteps(
                networks[""], lambda timesteps: self._mask_ranks(timesteps, timestep_rank), timestep_rank.told
            )

    def down_parameters(self) -> list[nn.Parameter]:
        """Every A, in the networks' order."""
        return [layer.down for layer in self.layers.values()]

    def up_parameters(self) -> list[nn.Parameter]:
        """Every B, in the networks' order."""
        return [layer.up for layer in self.layers.values()]

    def magnitude_parameters(self) -> list[nn.Parameter]:
        """Every magnitude of DoRA, in the networks' order."""
        return [layer.magnitude for layer in self.layers.values() if isinstance(layer, DoraLayer)]

    def parameters(self) -> list[nn.Parameter]:
        """Every A, then every B, then every magnitude."""
        return self.down_parameters() + self.up_parameters() + self.magnitude_parameters()

    def num_parameters(self) -> int:
        """Number of trained parameters."""
        return sum(parameter.numel() for parameter in self.parameters())

    def num_base_parameters(self) -> int:
        """Number of parameters of the adapted networks themselves; text encoders count if any is adapted."""
        networks = [network for prefix, network in self._networks.items() if not prefix or self.adapts_text]
        return sum(map(num_weights, networks)) - self.num_parameters()

    def initial_factors(self) -> list[Tensor]:
        """Every frozen A0 and B0, in the networks' order; a run's checkpoint saves them."""
        return [tensor for layer in self.layers.values() for tensor in layer.initial or ()]

    def summary(self) -> dict[str, int]:
        """Number of layers by kind, in the order of `TARGETS`."""
        found = list(self.kinds().values())
        return {name: found.count(name) for name in TARGETS if name in found}

    def kinds(self) -> dict[str, str | None]:
        """The kind of every layer, by its path."""
        return {path: target_of(path) for path in self.layers}

    def described(self) -> str:
        """A sentence that tells which layers are trained, and at which ranks."""
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.summary().items())
        ranks = sorted({layer.rank for layer in self.layers.values()})
        told = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
        numbers = sorted({n for path in self.layers if (n := self.blocks.number(path)) is not None})
        inside = f", in the blocks {', '.join(map(str, numbers))}" if numbers else ""
        return f"{len(self.layers)} layers are trained: {kinds}{inside}; {told}."

    @property
    def adapts_text(self) -> bool:
        """Whether any layer is in a text encoder, so that text embeddings change during training."""
        return any(path.startswith(TEXT_ENCODER) for path in self.layers)

    def state(self) -> LoraState:
        """A copy of the weights, float32 on the CPU."""

        def copy(tensor: Tensor) -> Tensor:
            return tensor.detach().float().cpu().clone()

        state: LoraState = {}
        for path, layer in self.layers.items():
            magnitude = copy(layer.magnitude) if isinstance(layer, DoraLayer) else None
            initial = None if layer.initial is None else (copy(layer.initial[0]), copy(layer.initial[1]))
            state[path] = LoraWeights(copy(layer.down), copy(layer.up), layer.alpha, magnitude, initial)
        return state

    @torch.no_grad()
    def load(self, state: LoraState) -> None:
        """Load weights of the same modules, ranks and kind.

        Raises:
            ConfigError: The modules, their shapes or their kind differ.
        """
        own = {
            path: (layer.down.shape, layer.up.shape, not isinstance(layer, DoraLayer), layer.initial is None)
            for path, layer in self.layers.items()
        }
        if own != {p: (w.down.shape, w.up.shape, w.magnitude is None, w.initial is None) for p, w in state.items()}:
            raise ConfigError(
                "The LoRA weights do not fit this adapter: modules, ranks or kind differ. Set lora.targets, lora.rank, "
                "lora.init and lora.dora as in the run that trained them."
            )
        for path, layer in self.layers.items():
            weights = state[path]
            if weights.initial is not None:
                layer.set_initial(*weights.initial)
            layer.down.copy_(weights.down)
            layer.up.copy_(weights.up)
            if isinstance(layer, DoraLayer) and weights.magnitude is not None:
                layer.magnitude.copy_(weights.magnitude)
            layer.alpha = weights.alpha

    def set_strength(self, strength: float) -> None:
        """Scale the adapter's update: 0 is the plain base, 1 the trained strength."""
        for layer in self.layers.values():
            layer.strength = strength

    @contextmanager
    def at_strength(self, strength: float) -> Iterator[None]:
        """Scale the adapter's update inside the block; afterwards every layer is as it was before."""
        before = [(layer, layer.strength) for layer in self.layers.values()]
        self.set_strength(strength)
        try:
            yield
        finally:
            for layer, own in before:
                layer.strength = own

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Switch the adapter off inside the block; afterwards every layer is as it was before."""
        before = [(layer, layer.enabled) for layer in self.layers.values()]
        for layer, _ in before:
            layer.enabled = False
        try:
            yield
        finally:
            for layer, enabled in before:
                layer.enabled = enabled

    @contextmanager
    def dropping(self, seed: int, exposures: Sequence[tuple[str, int]]) -> Iterator[None]:
        """Switch dropout on inside the block, for batches of these samples.

        Args:
            seed: The run's seed.
            exposures: (example, exposure) of every sample; a sample's zeros depend on seed, module path and these.
        """
        with dropping(self.layers, seed, exposures):
            yield

    def remove(self) -> None:
        """Restore the networks' original modules."""
        if self._watch is not None:
            self._watch.remove()
        for path, layer in self.layers.items():
            setattr(*_place(self._networks, path), layer.base)

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
    spec: AdapterSpec | None = None,
    text_encoders: Sequence[nn.Module] = (),
) -> Adapter:
    """Freeze a base's networks and put a new adapter on some of their layers.

    Args:
        unet: Changed in place, as the text encoders are where paths name their modules.
        paths: Module paths, as `find_targets` returns them.
        rank: r of every layer that no selector in `spec.target_ranks` is of.
        alpha: alpha of every layer that none in `spec.target_alphas` is of.
        seed: The run's seed; a layer's initial weights depend on it and on the module path alone.

    Raises:
        ConfigError: `spec.init` needs more singular values than a layer has, or a selector is of none of the paths.
    """
    spec, blocks = spec or AdapterSpec(), blocks_of(unet)
    kinds = {path: target_of(path) for path in paths}
    blocks.refuse_unused("lora.target_ranks", spec.target_ranks, kinds)
    blocks.refuse_unused("lora.target_alphas", spec.target_alphas, kinds)
    networks = _frozen(unet, text_encoders)
    layers: dict[str, LoraLayer] = {}
    for path in paths:
        r = blocks.value(spec.target_ranks, path, kinds[path], rank)
        numerator = blocks.value(spec.target_alphas, path, kinds[path], alpha)
        # Files store alpha and r alone, so rsLoRA is an alpha larger by sqrt(r).
        numerator = numerator * math.sqrt(r) if spec.rslora else numerator
        generator = seeds.generator(seed, "lora down", path)
        layer = layers[path] = _adapt(networks, path, r, numerator, dora=spec.dora, generator=generator)
        if spec.init != "gaussian":
            drawn = seeds.generator(seed, "lora start", path)
            layer.set_initial(*initial_factors(spec.init, layer.base.weight, r, layer.scale, generator=drawn))
        layer.dropout, layer.rank_dropout = spec.dropout, spec.rank_dropout
        layer.module_dropout = spec.module_dropout
    return Adapter(networks, layers, spec.timestep_rank)


def inject_state(
    unet: nn.Module,
    state: LoraState,
    *,
    text_encoders: Sequence[nn.Module] = (),
    timestep_rank: TimestepRank | None = None,
) -> Adapter:
    """Put existing weights on a base; ranks and alphas may differ between modules."""
    networks = _frozen(unet, text_encoders)
    layers: dict[str, LoraLayer] = {}
    for path, weights in state.items():
        dora = weights.magnitude is not None
        layers[path] = _adapt(networks, path, weights.down.shape[0], weights.alpha, dora=dora)
        if weights.initial is not None:
            layers[path].set_initial(*weights.initial)
    adapter = Adapter(networks, layers, timestep_rank)
    adapter.load(state)
    return adapter


def _frozen(unet: nn.Module, text_encoders: Sequence[nn.Module]) -> dict[str, nn.Module]:
    """The networks by prefix, with all of their own weights frozen."""
    networks = by_prefix(unet, text_encoders)
    for network in networks.values():
        network.requires_grad_(False)
    return networks


def _adapt(
    networks: Mapping[str, nn.Module],
    path: str,
    rank: int,
    alpha: float,
    *,
    dora: bool,
    generator: torch.Generator | None = None,
) -> LoraLayer:
    """Replace the module at a path by its adapter layer."""
    parent, name = _place(networks, path)
    module = parent.get_submodule(name)
    layer: LoraLayer
    if isinstance(module, nn.Conv2d):
        assert module.groups == 1, "no convolution among the targets has groups"
        layer = (DoraConv2d if dora else LoraConv2d)(module, rank, alpha, generator=generator)
    else:
        assert isinstance(module, nn.Linear | QuantizedLinear), f"{type(module).__name__} cannot be adapted"
        layer = (DoraLinear if dora else LoraLinear)(module, rank, alpha, generator=generator)
    # A frozen block may be on the host; the adapter belongs on the network's device.
    layer.place(next(networks[_prefix(path)].parameters()).device)
    setattr(parent, name, layer)
    return layer


def _place(networks: Mapping[str, nn.Module], path: str) -> tuple[nn.Module, str]:
    """The module that holds the one at a path, and its name there."""
    prefix = _prefix(path)
    parent, _, name = path.removeprefix(prefix).rpartition(".")
    return networks[prefix].get_submodule(parent), name


def _prefix(path: str) -> str:
    network = network_of(path)
    return "" if network == "unet" else f"{network}."
