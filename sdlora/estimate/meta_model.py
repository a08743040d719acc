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

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel, ZImageTransformer2DModel
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_flop_count, shape_wrapper
from transformers import CLIPTextConfig, CLIPTextModel, Qwen3Config, Qwen3Model

from sdlora.diffusion.flow import FlowLevels, level
from sdlora.diffusion.noise import DdpmLevels, NoiseLevels
from sdlora.lora.quantize import Quantization, quantize_linears
from sdlora.models import z_image
from sdlora.models.architectures import ARCHITECTURES, Family, identify, read_header
from sdlora.models.base import BaseModel, TextEmbeddings
from sdlora.models.unet import UnetModel

META = torch.device("meta")


@dataclass(frozen=True)
class Shapes:
    """The configurations of a base model's networks, and bytes of their parameters and buffers.

    Attributes:
        network: Of a UNet2DConditionModel or a ZImageTransformer2DModel of diffusers.
        vae: Of an AutoencoderKL of diffusers.
        text_encoders: Of each text encoder, as CLIPTextConfig or Qwen3Config of transformers.
    """

    network: Mapping[str, Any]
    vae: Mapping[str, Any]
    text_encoders: tuple[Mapping[str, Any], ...]
    vae_bytes: int
    text_bytes: int

    @property
    def frozen_bytes(self) -> int:
        """VAE and text encoders together."""
        return self.vae_bytes + self.text_bytes

    @property
    def latent_factor(self) -> int:
        """Pixels per latent, along one edge."""
        return int(2 ** (len(self.vae["block_out_channels"]) - 1))

    @property
    def resolution_px(self) -> int:
        """The edge length that the base model was trained at, in pixels."""
        size = self.network.get("sample_size")
        # A transformer's configuration knows no size; its VAE's does.
        return int(self.vae["sample_size"]) if size is None else int(size) * self.latent_factor

    @property
    def is_z_image(self) -> bool:
        """Whether the network is Z-Image's, by the width of captions that it alone names so."""
        return "cap_feat_dim" in self.network


def shapes_of_family(family: Family) -> Shapes:
    """The shapes of a model family."""
    if family == "z-image":
        with META:
            network = dict(ZImageTransformer2DModel().config)
            encoder = Qwen3Model(Qwen3Config(**z_image.QWEN3_4B)).to(torch.bfloat16)
            decoder = AutoencoderKL.from_config(z_image.VAE)
        return Shapes(network, z_image.VAE, (z_image.QWEN3_4B,), num_bytes(decoder), num_bytes(encoder))
    architecture = ARCHITECTURES[family]
    return shapes_of_configs(architecture.unet, architecture.vae, architecture.text_encoders)


def shapes_of_configs(
    unet: Mapping[str, Any], vae: Mapping[str, Any], text_encoders: Sequence[Mapping[str, Any]]
) -> Shapes:
    """The shapes of a base model from its networks' configurations, VAE and text encoders in float32."""
    with META:
        decoder = AutoencoderKL.from_config(dict(vae))
        encoders = [CLIPTextModel(CLIPTextConfig(**config)) for config in text_encoders]
    return Shapes(unet, vae, tuple(text_encoders), num_bytes(decoder), num_bytes(*encoders))


def shapes_on_disk(place: Path) -> Shapes:
    """The shapes of a base model in one file, or a folder in diffusers' layout, from its header or configurations.

    Raises:
        OSError: A configuration or the file cannot be read; also `ValueError` and `KeyError` for a broken one.
        BaseModelError: The file is no base model.
    """
    if place.is_file():
        found = identify(read_header(place), place.name).architecture
        return shapes_of_configs(found.unet, found.vae, found.text_encoders)

    def read(part: str) -> Mapping[str, Any]:
        config: Mapping[str, Any] = json.loads((place / part / "config.json").read_text(encoding="utf-8"))
        return config

    parts = [part for part in ("text_encoder", "text_encoder_2") if (place / part).is_dir()]
    return shapes_of_configs(read("unet"), read("vae"), [read(part) for part in parts])


def shapes_of_base(base: BaseModel) -> Shapes:
    """The shapes of a loaded base model."""
    vae, encoders = base.vae, base.text_encoders
    texts = tuple(encoder.config.to_dict() for encoder in encoders)
    return Shapes(dict(base.network.config), dict(vae.config), texts, num_bytes(vae), num_bytes(*encoders))


def num_bytes(*networks: nn.Module) -> int:
    """Bytes of the parameters and buffers of networks, shared ones counted once."""
    tensors = {id(t): t for n in networks for t in (*n.parameters(), *n.buffers())}
    return sum(tensor.nbytes for tensor in tensors.values())


class MetaBase:
    """Networks of given shapes on the meta device, with the part of `sdlora.models.base.BaseModel` that a loss needs.

    Type and quantization are the UNet's; text encoders are only built where they are trained.
    """

    device = META
    _kind: Any = UNet2DConditionModel
    _packed_blocks = UnetModel.packed_blocks
    network_waits = UnetModel.network_waits
    _caption_tokens: int | None = None  # all that CLIP reads

    def __init__(
        self,
        shapes: Shapes,
        dtype: torch.dtype,
        *,
        quantization: Quantization | Literal["none"] = "none",
        text_is_trained: bool = False,
    ) -> None:
        with META:
            self.network: Any = self._kind.from_config(dict(shapes.network))
            self.vae: AutoencoderKL = AutoencoderKL.from_config(dict(shapes.vae)).eval()
            configs = shapes.text_encoders if text_is_trained else ()
            self.text_encoders = tuple(CLIPTextModel(CLIPTextConfig(**config)).eval() for config in configs)
            self.levels: NoiseLevels = DdpmLevels(torch.empty(1000), "epsilon")
        nn.Module.to(self.network.requires_grad_(False).eval(), dtype)
        if quantization != "none":
            quantize_linears(self.network, quantization, self._packed_blocks)
        self.num_tokens = self._caption_tokens or int(shapes.text_encoders[0]["max_position_embeddings"])
        self.pooled_width = int(shapes.text_encoders[-1].get("projection_dim", 0))

    def text(self, batch_size: int) -> TextEmbeddings:
        """Text embeddings as the UNet takes them, (B, L, D), through the text encoders if they are trained."""
        config = self.network.config
        if self.text_encoders:
            tokens = torch.zeros(batch_size, self.num_tokens, dtype=torch.long, device=META)
            outputs = [encoder(tokens, output_hidden_states=True) for encoder in self.text_encoders]
            # Two encoders are read at their last layer but one, and concatenated.
            two = len(outputs) > 1
            states = torch.cat([o.hidden_states[-2] if two else o.last_hidden_state for o in outputs], dim=-1)
        else:
            states = torch.empty(batch_size, self.num_tokens, config.cross_attention_dim, device=META)
        found = {"states": states}
        if config.addition_embed_type == "text_time":
            numbers = config.projection_class_embeddings_input_dim - self.pooled_width
            num_sizes = numbers // config.addition_time_embed_dim
            found["text_embeds"] = torch.empty(batch_size, self.pooled_width, device=META)
            found["time_ids"] = torch.empty(batch_size, num_sizes, device=META)
        return found

    def predict(self, noisy: Tensor, timesteps: Tensor, text: TextEmbeddings) -> Tensor:
        """The UNet's prediction (B, C, h, w) in float32, for latents (B, C, h, w) at timesteps (B,)."""
        dtype = self.network.dtype
        added = {name: value.to(dtype) for name, value in text.items() if name != "states"}
        prediction: Tensor = self.network(
            noisy.to(dtype), timesteps, text["states"].to(dtype), added_cond_kwargs=added or None, return_dict=False
        )[0]
        return prediction.float()


class MetaZImage(MetaBase):
    """The same for Z-Image, with captions of 128 tokens."""

    _kind = ZImageTransformer2DModel
    _packed_blocks = z_image.ZImage.packed_blocks
    network_waits = z_image.ZImage.network_waits
    _caption_tokens = 128

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.levels = FlowLevels()

    def text(self, batch_size: int) -> TextEmbeddings:
        """{"states": (B, L, D)}."""
        return {"states": torch.empty(batch_size, self.num_tokens, self.network.config.cap_feat_dim, device=META)}

    def predict(self, noisy: Tensor, timesteps: Tensor, text: TextEmbeddings) -> Tensor:
        """The velocity (B, C, h, w) in float32, for latents (B, C, h, w) at timesteps (B,)."""
        dtype = self.network.dtype
        states = list(text["states"].to(dtype))
        return z_image.velocity(self.network, noisy.to(dtype), level(timesteps).float(), states).float()


def meta_base(shapes: Shapes, dtype: torch.dtype, **options: Any) -> MetaBase:
    """A base model of given shapes; the options are those of `MetaBase`."""
    return (MetaZImage if shapes.is_z_image else MetaBase)(shapes, dtype, **options)


def empty_latents(shapes: Shapes, batch_size: int, size_px: Sequence[int]) -> Tensor:
    """Meta latents (B, C, h, w) of images of a width and a height in pixels."""
    width, height = (edge // shapes.latent_factor for edge in size_px)
    channels = shapes.network.get("in_channels", 4)
    return torch.empty(batch_size, channels, height, width, device=META)


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
