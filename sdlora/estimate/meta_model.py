"""A base model of shapes without weights, on the meta device, and what code costs there: bytes and operations.

Used by all estimates, so that any model is counted on any machine. Shapes: B batch, C latent channels, h/w latents, L
tokens, D text width.
"""

from __future__ import annotations

import functools
import json
import math
import weakref
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_flop_count, shape_wrapper

from sdlora.common.families import Family
from sdlora.lora.block_offload import visiting_bytes
from sdlora.lora.quantize import Quantization, quantize_linears
from sdlora.models.architectures import read_header
from sdlora.models.base import BaseModel, TextEmbeddings
from sdlora.models.families import CLASSES, family_named, family_on_disk, identify_base

META = torch.device("meta")


@dataclass(frozen=True)
class Shapes:
    """The configurations of a base model's networks, and bytes of their parameters and buffers.

    Attributes:
        network: Of its class in diffusers.
        vae: Of an autoencoder of diffusers.
        text_encoders: Of each text encoder, as its configuration in transformers.
        family: Of the base model; 1.x, 2.x and XL count alike at equal configurations.
    """

    network: Mapping[str, Any]
    vae: Mapping[str, Any]
    text_encoders: tuple[Mapping[str, Any], ...]
    vae_bytes: int
    text_bytes: int
    family: Family = "sd1"

    @property
    def model(self) -> type[BaseModel]:
        """The family's class."""
        return CLASSES[self.family]

    @property
    def frozen_bytes(self) -> int:
        """VAE and text encoders together."""
        return self.vae_bytes + self.text_bytes

    @property
    def offloaded_text_bytes(self) -> int:
        """Bytes of text encoders on the device under base.offload, which moves the blocks of language models alone."""
        if not self.model.keeps_text_type:
            return self.text_bytes
        return sum(_resident_text_bytes(self.family, json.dumps(dict(config))) for config in self.text_encoders)

    @property
    def latent_channels(self) -> int:
        """C."""
        return self.model.latent_shape(self.network, self.vae)[0]

    @property
    def latent_factor(self) -> int:
        """Pixels per latent, along one edge."""
        return self.model.latent_shape(self.network, self.vae)[1]

    @property
    def resolution_px(self) -> int:
        """The edge length that the base model was trained at, in pixels."""
        size = self.network.get("sample_size")
        # A transformer's configuration knows no size; its VAE's does.
        return int(self.vae["sample_size"]) if size is None else int(size) * self.latent_factor


def shapes_of_family(family: Family) -> Shapes:
    """The shapes of a model family."""
    return shapes_of_configs(family, *CLASSES[family].true_configs())


def shapes_of_configs(
    family: Family, network: Mapping[str, Any], vae: Mapping[str, Any], text_encoders: Sequence[Mapping[str, Any]]
) -> Shapes:
    """The shapes of a base model from its networks' configurations."""
    vae_bytes = _num_bytes(family, "vae", json.dumps(dict(vae)))
    text_bytes = [_num_bytes(family, "text", json.dumps(dict(config))) for config in text_encoders]
    return Shapes(network, vae, tuple(text_encoders), vae_bytes, sum(text_bytes), family)


@functools.lru_cache(maxsize=32)
def _num_bytes(family: Family, part: Literal["vae", "text"], config: str) -> int:
    """Bytes of a family's VAE or one of its text encoders, by its configuration as JSON."""
    with META:
        found = json.loads(config)
        return num_bytes(
            empty_network("AutoencoderKL", found) if part == "vae" else CLASSES[family].empty_text_encoder(found)
        )


@functools.lru_cache(maxsize=32)
def _resident_text_bytes(family: Family, config: str) -> int:
    """Bytes of a language model on the device while its blocks visit it two at a time, by its configuration as JSON."""
    with META:
        encoder = CLASSES[family].empty_text_encoder(json.loads(config)).requires_grad_(False)
    block_bytes, visiting = visiting_bytes(encoder, CLASSES[family].text_block_lists)
    return num_bytes(encoder) - block_bytes + visiting


def empty_network(kind: str, config: Mapping[str, Any]) -> Any:
    """A network of diffusers; its class is the configuration's if it names one."""
    return getattr(diffusers, config.get("_class_name", kind)).from_config(dict(config))


def shapes_on_disk(place: Path) -> Shapes:
    """The shapes of a base model in one file, or a folder in diffusers' layout, from its header or configurations.

    Raises:
        OSError: A configuration or the file cannot be read; also `ValueError` and `KeyError` for a broken one.
        BaseModelError: The file is no base model.
    """
    if place.is_file():
        found = identify_base(read_header(place), place.name)
        shape = found.architecture
        return shapes_of_configs(found.family, shape.unet, shape.vae, shape.text_encoders)

    def read(part: str) -> Mapping[str, Any]:
        config: Mapping[str, Any] = json.loads((place / part / "config.json").read_text(encoding="utf-8"))
        return config

    family = family_on_disk(str(place)) or "sd1"
    model = CLASSES[family]
    return shapes_of_configs(family, read(model.network_name), read("vae"), [read(part) for part in model.text_parts])


def shapes_of_base(base: BaseModel) -> Shapes:
    """The shapes of a loaded base model."""
    vae, encoders = base.vae, base.text_encoders
    texts = tuple(encoder.config.to_dict() for encoder in encoders)
    family = family_named(base.architecture)
    return Shapes(dict(base.network.config), dict(vae.config), texts, num_bytes(vae), num_bytes(*encoders), family)


def num_bytes(*networks: nn.Module, on: str | None = None) -> int:
    """Bytes of the parameters and buffers of networks, or of those on a type of device; shared ones counted once."""
    tensors = {id(t): t for n in networks for t in (*n.parameters(), *n.buffers())}
    return sum(tensor.nbytes for tensor in tensors.values() if on in (None, tensor.device.type))


class MetaBase:
    """Networks of given shapes on the meta device, with the part of `sdlora.models.base.BaseModel` that a loss needs.

    Type and quantization are the network's; text encoders are only built where they are trained.
    """

    device = META

    def __init__(
        self,
        shapes: Shapes,
        dtype: torch.dtype,
        *,
        quantization: Quantization | Literal["none"] = "none",
        text_is_trained: bool = False,
    ) -> None:
        self.model, self._text_configs = shapes.model, shapes.text_encoders
        with META:
            self.network = empty_network(self.model.network_class, shapes.network)
            self.vae = empty_network("AutoencoderKL", shapes.vae).eval()
            configs = shapes.text_encoders if text_is_trained else ()
            self.text_encoders = tuple(self.model.empty_text_encoder(config).eval() for config in configs)
            self.levels = self.model.empty_levels()
        nn.Module.to(self.network.requires_grad_(False).eval(), dtype)
        if quantization != "none":
            quantize_linears(self.network, quantization, self.model.packed_blocks)

    def text(self, batch_size: int) -> TextEmbeddings:
        """Text embeddings as the network takes them, through the text encoders if they are trained."""
        with META:
            found = self.model.empty_text(self.network, self._text_configs, batch_size)
        if self.text_encoders:
            tokens = torch.zeros(found["states"].shape[:2], dtype=torch.long, device=META)
            outputs: list[Any] = [encoder(tokens, output_hidden_states=True) for encoder in self.text_encoders]
            # Two encoders are read at their last layer but one, and concatenated.
            two = len(outputs) > 1
            found["states"] = torch.cat([o.hidden_states[-2] if two else o.last_hidden_state for o in outputs], dim=-1)
        return found

    def predict(self, noisy: Tensor, timesteps: Tensor, text: TextEmbeddings) -> Tensor:
        """The network's prediction (B, C, h, w) in float32, for latents (B, C, h, w) at timesteps (B,)."""
        return self.model.denoise(self.network, noisy, timesteps, text)


def empty_latents(shapes: Shapes, batch_size: int, size_px: Sequence[int]) -> Tensor:
    """Meta latents (B, C, h, w) of images of a width and a height in pixels."""
    width, height = (edge // shapes.latent_factor for edge in size_px)
    return torch.empty(batch_size, shapes.latent_channels, height, width, device=META)


def empty_codes(shapes: Shapes, batch_size: int, size_px: Sequence[int]) -> Tensor:
    """What the VAE decodes to images of a width and a height in pixels, which some families rearrange to latents."""
    factor = 2 ** (len(shapes.vae["block_out_channels"]) - 1)
    width, height = (edge // factor for edge in size_px)
    return torch.empty(batch_size, int(shapes.vae["latent_channels"]), height, width, device=META)


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
    """Counts storages and FLOPs.

    A network repeats its operations, and torch works out the shapes of each in Python: those of operations that only
    make new tensors, or only write into their first argument, are worked out once.
    """

    def __init__(self, cost: Cost) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.cost = cost
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()
        self._made: dict[Any, _Made | None] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        key = _key(func, args, kwargs)
        if key is not None and (made := self._made.get(key)) is not None:
            result = made.again(args)
            self.cost.flops += made.flops
        else:
            given = {leaf.untyped_storage() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
            result = func(*args, **kwargs)
            # torch's own FlopCounterMode would keep the graphs that checkpointing makes, and their memory with them.
            formula = _FLOPS.get(func.overloadpacket)
            flops = 0 if formula is None else formula(*args, **kwargs, out_val=result)
            self.cost.flops += flops
            self._known.update(given)
            if key is not None:
                self._made[key] = _made(result, args, given, flops)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._hold(leaf.untyped_storage())
        return result

    def _hold(self, storage: torch.UntypedStorage) -> None:
        if storage not in self._known:
            self._known.add(storage)
            self.cost.hold(storage.nbytes())
            weakref.finalize(storage, self.cost.hold, -storage.nbytes())


@dataclass(frozen=True)
class _Made:
    """What an operation does to meta tensors of certain shapes.

    Attributes:
        tensors: Size, stride and type of each tensor of its result; None for a result that is None. None if the result
            is its first argument.
        is_single: Whether its result is a tensor, not a tuple.
    """

    tensors: tuple[tuple[torch.Size, tuple[int, ...], torch.dtype] | None, ...] | None
    is_single: bool
    flops: int

    def again(self, args: Any) -> Any:
        """The same result anew, for arguments of the same shapes."""
        if self.tensors is None:
            return args[0]
        made = [
            None if one is None else torch.empty_strided(*one[:2], dtype=one[2], device=META) for one in self.tensors
        ]
        return made[0] if self.is_single else tuple(made)


def _made(result: Any, args: Any, given: Collection[torch.UntypedStorage], flops: int) -> _Made | None:
    """What an operation has done; None for anything but new tensors without gaps, or its first argument."""
    if args and result is args[0]:
        return _Made(None, True, flops)
    found: list[Any] = []
    for one in result if isinstance(result, tuple) else (result,):
        if one is None:
            found.append(None)
            continue
        if type(one) is not Tensor or one.untyped_storage() in given or one.storage_offset() != 0:
            return None
        extent = 1 + sum((size - 1) * stride for size, stride in zip(one.shape, one.stride(), strict=True))
        if one.untyped_storage().nbytes() != (extent if one.numel() else 0) * one.itemsize:
            return None
        found.append((one.shape, one.stride(), one.dtype))
    return _Made(tuple(found), not isinstance(result, tuple), flops)


_IN_PLACE = frozenset(
    getattr(torch.ops.aten, name) for name in ("add_", "addmm_", "baddbmm_", "copy_", "mul_", "zero_")
)


@functools.cache
def _is_simple(func: Any) -> bool:
    """Whether an operation only makes new tensors, or only writes into its first argument."""
    schema = func._schema
    aliases = any(one.alias_info for one in (*schema.arguments, *schema.returns))
    return func.overloadpacket in _IN_PLACE or not (schema.is_mutable or aliases)


def _key(func: Any, args: Any, kwargs: Any) -> Any:
    """What an operation's result follows from; None if that is not known."""
    if not _is_simple(func):
        return None
    leaves, structure = tree_flatten((args, kwargs))
    known: list[Any] = [func, structure]
    for leaf in leaves:
        if not isinstance(leaf, Tensor):
            known.append((type(leaf), leaf))
        elif type(leaf) in (Tensor, nn.Parameter) and leaf.device.type == "meta":
            known.append((leaf.shape, leaf.stride(), leaf.dtype))
        else:
            return None
    return tuple(known)
