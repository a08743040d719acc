"""Ranks by timestep in diffusers pipelines, for a LoRA file that was trained with them.

For users of diffusers: a LoRA's weights cannot tell which ranks belong to which timestep, but its metadata does.
Shapes: B batch, F frames, i in, r rank.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sdlora.errors import DataError
from sdlora.lora.inject import LoraState
from sdlora.lora.timestep_rank import TimestepRank, rank_mask, timestep_rank_in, watch_timesteps
from sdlora.lora_files.names import kohya_name
from sdlora.lora_files.read import LoraFile, parse_lora, read_tensors

_PROBED = 64  # so many values of a layer tell one LoRA from another


def apply_timestep_rank(pipe: DiffusionPipeline, file: str | Path, adapter_name: str | None = None) -> None:
    """Make a pipeline use a LoRA's ranks by timestep, as in training.

    Works with any pipeline around a UNet or a transformer, also where guidance or frames give its layers other batches
    than its own. Where another LoRA is put in its place without unloading it (`hotswap=True`), the ranks by timestep
    end with a warning; call this again with the new file if it has some.

    Args:
        pipe: A diffusers pipeline after `pipe.load_lora_weights(file)`. Not fused: merged weights are the same at
            every timestep, so that such a pipeline raises a `DataError` when it is used.
        adapter_name: The name it was loaded under; optional if the pipeline has only one LoRA.

    Raises:
        DataError: The file cannot be read or was trained without a timestep rank, or the pipeline's UNet has no such
            LoRA, or another one than the file's, or has it fused.

    Source: Soboleva et al. 2507.05964, equation 5.
    """
    found = parse_lora(*read_tensors(Path(file)), name=Path(file).name)
    setting = timestep_rank_in(found.metadata, found.name)
    if setting is None:
        raise DataError(_without_setting(found))
    unet = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    adapters = sorted(getattr(unet, "peft_config", {}))
    name = adapters[0] if adapter_name is None and len(adapters) == 1 else adapter_name
    if name is None or name not in adapters:
        raise DataError(
            f"The pipeline's UNet has no LoRA {name!r}; it has: {', '.join(adapters) or 'none'}. "
            "Call load_lora_weights first, and give adapter_name if there are several."
        )
    # The ranks lie in the file once or, beside frozen initial factors, twice.
    masks = _Masks(setting, 2 if "sdlora.frozen_start" in found.metadata else 1, found.name, name)
    for layer, weights in _layers(unet, name, found.state).items():
        if weights is None:
            raise DataError(
                f"The LoRA {name!r} in the pipeline's UNet is not {found.name}. Load that file, or give the "
                "adapter_name under which it was loaded."
            )
        masks.add(layer, rank=len(weights))
    masks.check_not_fused()
    masks.handles.append(watch_timesteps(unet, masks.see, setting.told))


def _without_setting(file: LoraFile) -> str:
    try:
        trained = json.loads(file.metadata.get("sdlora.settings", "{}"))["lora"]["timestep_rank_min"]
    except (ValueError, KeyError, TypeError, RecursionError):
        trained = None
    if trained is not None:
        return (
            f"{file.name} was made of a LoRA with a timestep rank, but resizing or merging has changed its ranks, so "
            "that they no longer belong to timesteps. Use the file of the run, or this one without this call."
        )
    return f"{file.name} was trained without a timestep rank. Use it as it is, without this call."


def _layers(unet: nn.Module, name: str, state: LoraState) -> Mapping[nn.Module, Tensor | None]:
    """PEFT's layers with an adapter, each with its A in a file; None where the layer's A is another one."""
    found: dict[nn.Module, Tensor | None] = {}
    for path, module in unet.named_modules():
        downs = getattr(module, "lora_A", None)
        if not isinstance(downs, nn.ModuleDict) or name not in downs:
            continue
        weights, loaded = state.get(kohya_name(path)), downs[name].get_parameter("weight")
        found[module] = None if weights is None or not _is_same(loaded, weights.down) else weights.down
    return found


def _is_same(loaded: Tensor, down: Tensor) -> bool:
    # A layer that is prepared for hot-swapping has more ranks than its file, which are zero.
    if loaded.shape[1:] != down.shape[1:] or len(loaded) < len(down):
        return False
    # Weights that are offloaded one by one cannot be seen here.
    return loaded.is_meta or _are_equal(loaded.detach()[: len(down)].cpu().float(), down)


def _are_equal(one: Tensor, other: Tensor) -> bool:
    # Coarser than the rounding of bfloat16, in which a pipeline may hold the weights.
    return one.shape == other.shape and torch.allclose(one, other, rtol=2e-2, atol=1e-6)


class _Masks:
    """The masks of a LoRA's layers in a pipeline, at the timesteps of the current call of the UNet."""

    def __init__(self, setting: TimestepRank, copies: int, file: str, adapter: str) -> None:
        self.setting, self.copies, self.file, self.adapter = setting, copies, file, adapter
        self.handles: list[RemovableHandle] = []
        self._layers: list[Any] = []
        self._timesteps = torch.zeros(1)
        self._probe: tuple[Any, Tensor] | None = None

    def add(self, layer: Any, rank: int) -> None:
        """Mask a layer of PEFT, `rank` of whose ranks are the file's."""
        down = layer.lora_A[self.adapter]
        self._layers.append(layer)
        if self._probe is None and not down.weight.is_meta:
            self._probe = down, _first_values(down.weight)

        def mask_inner(_: nn.Module, __: Any, inner: Tensor) -> Tensor:
            is_image = isinstance(down, nn.Conv2d)
            shape = (-1, inner.shape[1], 1, 1) if is_image else (-1, *(1 for _ in inner.shape[1:-1]), inner.shape[-1])
            return inner * self._mask(rank, inner.shape[1] if is_image else inner.shape[-1], inner).reshape(shape)

        self.handles.append(down.register_forward_hook(mask_inner))

    def _mask(self, rank: int, padded: int, inner: Tensor) -> Tensor:
        """(1, padded) for one timestep of all, else (B, padded), each row as often as `inner` has samples of it."""
        mask = rank_mask(self._timesteps, rank // self.copies, self.setting).to(inner).repeat(1, self.copies)
        mask = nn.functional.pad(mask, (0, padded - rank), value=1.0)
        if len(mask) in (1, len(inner)):
            return mask
        if len(inner) % len(mask):
            raise DataError(
                f"{self.file} has ranks by timestep, and this pipeline gives a layer {len(inner)} samples for "
                f"{len(mask)} different timesteps. Use the same timestep for all."
            )
        return mask.repeat_interleave(len(inner) // len(mask), dim=0)  # frames lie beside each other

    def see(self, timesteps: Tensor) -> None:
        """Take the timesteps of a call of the UNet, (B,)."""
        self.check_not_fused()
        if self._is_replaced():
            for handle in self.handles:
                handle.remove()
            warnings.warn(
                f"Another LoRA has taken the place of {self.file}, whose ranks by timestep end here. If the new file "
                "has some, call sdlora.apply_timestep_rank with it.",
                stacklevel=2,
            )
            return
        # Guidance and frames make other batches inside; with one timestep for all, one row fits them all.
        self._timesteps = timesteps[:1] if bool((timesteps == timesteps[0]).all()) else timesteps

    def check_not_fused(self) -> None:
        """Refuse a LoRA that is merged into the weights."""
        if any(self.adapter in layer.merged_adapters for layer in self._layers):
            raise DataError(
                f"{self.file} is fused into the UNet's weights, which are the same at every timestep, so that its "
                "ranks by timestep are lost. Call pipe.unfuse_lora(), and draw without fusing."
            )

    def _is_replaced(self) -> bool:
        if self._probe is None:
            return False
        down, values = self._probe
        weight: Tensor = down.weight
        return not weight.is_meta and not _are_equal(_first_values(weight), values)


def _first_values(weight: Tensor) -> Tensor:
    return weight.detach().flatten()[:_PROBED].float().cpu().clone()
