"""Timestep-dependent ranks (T-LoRA): all ranks at low noise, fewer at high noise.

An `Adapter` masks its layers' ranks with it at every call of the UNet. Shapes: B batch, r rank, T timesteps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sdlora.errors import DataError

_NUM_TIMESTEPS = 1000


@dataclass(frozen=True)
class TimestepRank:
    """Settings of timestep-dependent ranks."""

    rank_min: int  # r_min, the number of ranks at the highest noise, at least 1 and at most r
    alpha: float  # exponent of the fall of ranks with noise, above 0; 1 is linear


def timestep_rank_in(metadata: Mapping[str, str], file: str) -> TimestepRank | None:
    """The setting that a LoRA file was trained with, or None for all ranks at every timestep; `file` is its name.

    Raises:
        DataError: The metadata is not as sdlora writes it.
    """
    written = [metadata.get(f"sdlora.timestep_rank_{key}") for key in ("min", "alpha")]
    if written == [None, None]:
        return None
    try:
        setting = TimestepRank(int(written[0] or ""), float(written[1] or ""))
    except ValueError:
        setting = TimestepRank(0, 0.0)
    if setting.rank_min < 1 or not 0 < setting.alpha < math.inf:
        raise DataError(
            f"{file}: the metadata has the timestep rank minimum {written[0]!r} and alpha {written[1]!r}; they must be "
            "an integer of at least 1 and a number above 0. The file was changed after training; export it again."
        )
    return setting


def active_ranks(timesteps: Tensor, rank: int, setting: TimestepRank) -> Tensor:
    """Number of ranks of each sample: floor(((T - t) / T)^alpha (r - r_min)) + r_min.

    Args:
        timesteps: t in [0, T - 1], (B,), where T is 1000.
        rank: r, at least r_min.

    Returns:
        Integers in [r_min, r], (B,).

    Source: Soboleva et al. 2507.05964, equation 5.
    """
    share = ((_NUM_TIMESTEPS - timesteps.double()) / _NUM_TIMESTEPS) ** setting.alpha
    return torch.floor(share * (rank - setting.rank_min)).long() + setting.rank_min


def rank_mask(timesteps: Tensor, rank: int, setting: TimestepRank) -> Tensor:
    """The mask of each sample's first ranks that are in use, (B, r) float32 of ones and zeros."""
    active = active_ranks(timesteps, rank, setting)
    return (torch.arange(rank, device=timesteps.device) < active[:, None]).float()


def watch_timesteps(unet: nn.Module, callback: Callable[[Tensor], None]) -> RemovableHandle:
    """Call back with the timesteps of every forward pass of a UNet before it begins, until the handle is removed.

    Args:
        unet: Called as unet(sample, timestep, ...), as in diffusers.
        callback: Receives the timesteps of all samples, (B,), even if one timestep is given for all.
    """

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        sample = args[0] if args else kwargs["sample"]
        timesteps = torch.as_tensor(args[1] if len(args) > 1 else kwargs["timestep"], device=sample.device)
        callback(timesteps.reshape(-1).expand(len(sample)))

    return unet.register_forward_pre_hook(hook, with_kwargs=True, prepend=True)
