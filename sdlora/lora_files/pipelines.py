"""Timestep-dependent ranks in diffusers pipelines that load sdlora's files.

For users of diffusers: a LoRA's weights cannot tell which ranks belong to which timestep, but its metadata does.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from torch import Tensor, nn

from sdlora.errors import DataError
from sdlora.lora.timestep_rank import rank_mask, timestep_rank_in, watch_timesteps
from sdlora.lora_files.read import read_tensors


def apply_timestep_rank(pipe: DiffusionPipeline, file: str | Path, adapter_name: str | None = None) -> None:
    """Make a pipeline use a LoRA's ranks by timestep, as in training.

    Args:
        pipe: A diffusers pipeline after `pipe.load_lora_weights(file)`.
        adapter_name: The name it was loaded under; optional if the pipeline has only one LoRA.

    Raises:
        DataError: The file cannot be read or was trained without a timestep rank, or the pipeline's UNet has no such
            LoRA.

    Source: Soboleva et al. 2507.05964, equation 5.
    """
    _, metadata = read_tensors(Path(file))
    setting = timestep_rank_in(metadata, Path(file).name)
    if setting is None:
        raise DataError(f"{file} was trained without a timestep rank. Use it as it is, without this call.")
    # The ranks lie in the file once or, beside frozen initial factors, twice.
    copies = 2 if "sdlora.frozen_start" in metadata else 1
    unet = pipe.unet
    adapters = sorted(getattr(unet, "peft_config", {}))
    name = adapters[0] if adapter_name is None and len(adapters) == 1 else adapter_name
    if name is None or name not in adapters:
        raise DataError(
            f"The pipeline's UNet has no LoRA {name!r}; it has: {', '.join(adapters) or 'none'}. "
            "Call load_lora_weights first, and give adapter_name if there are several."
        )
    current: list[Tensor] = []

    def remember(timesteps: Tensor) -> None:
        current[:] = [timesteps]

    def hook(rank: int) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        def mask_inner(_: nn.Module, __: Any, inner: Tensor) -> Tensor:
            mask = rank_mask(current[0], rank // copies, setting).to(inner).repeat(1, copies)
            return inner * (mask[:, None] if inner.dim() == 3 else mask[:, :, None, None])

        return mask_inner

    watch_timesteps(unet, remember)
    for module in unet.modules():
        downs = getattr(module, "lora_A", None)
        down = downs[name] if isinstance(downs, nn.ModuleDict) and name in downs else None
        if isinstance(down, nn.Linear | nn.Conv2d):
            down.register_forward_hook(hook(down.weight.shape[0]))
