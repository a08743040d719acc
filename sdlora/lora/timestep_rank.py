"""How many ranks are used at each noise level (T-LoRA): all where there is little noise, few where there is much.

Shapes: B batch, r rank.
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


@dataclass(frozen=True)
class TimestepRank:
    """The settings of timestep-dependent ranks.

    Attributes:
        rank_min: r_min, the ranks used at the highest noise, at least 1 and at most r.
        alpha: How fast ranks fall away with noise, above 0; 1 is linear.
    """

    rank_min: int
    alpha: float


def timestep_rank_in(metadata: Mapping[str, str], file: str) -> TimestepRank | None:
    """The setting that a LoRA file was trained with, or None for all ranks everywhere.

    Args:
        metadata: The file's metadata.
        file: Its name, for messages.

    Raises:
        DataError: The metadata is not what sdlora writes.
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
            f"{file}: its timestep rank has the minimum {written[0]!r} and the alpha {written[1]!r} in the metadata; "
            "a whole number from 1 and a number above 0 are allowed. Was the file changed? Export it anew."
        )
    return setting


def active_ranks(timesteps: Tensor, rank: int, rank_min: int, alpha: float, num_timesteps: int = 1000) -> Tensor:
    """How many ranks each sample uses: floor(((T - t) / T)^alpha (r - r_min)) + r_min.

    Args:
        timesteps: t in [0, T - 1], (B,).
        rank: r.
        rank_min: r_min, in [1, r].
        alpha: Above 0.
        num_timesteps: T.

    Returns:
        Integers in [r_min, r], (B,).

    Source: Soboleva et al. 2507.05964, equation 5.
    """
    share = ((num_timesteps - timesteps.double()) / num_timesteps) ** alpha
    return torch.floor(share * (rank - rank_min)).long() + rank_min


def rank_mask(timesteps: Tensor, rank: int, setting: TimestepRank) -> Tensor:
    """Ones for the ranks that each sample uses, the first ones, and zeros for the others, (B, r) float32."""
    active = active_ranks(timesteps, rank, setting.rank_min, setting.alpha)
    return (torch.arange(rank, device=timesteps.device) < active[:, None]).float()


def watch_timesteps(unet: nn.Module, tell: Callable[[Tensor], None]) -> RemovableHandle:
    """Tell of every forward pass's timesteps before it begins, whoever calls the UNet.

    Args:
        unet: Called as unet(sample, timestep, ...), as in diffusers.
        tell: Receives the timesteps of all samples, (B,), also where one timestep is given for all.

    Returns:
        What takes this away again.
    """

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        sample = args[0] if args else kwargs["sample"]
        timesteps = torch.as_tensor(args[1] if len(args) > 1 else kwargs["timestep"], device=sample.device)
        tell(timesteps.reshape(-1).expand(len(sample)))

    return unet.register_forward_pre_hook(hook, with_kwargs=True, prepend=True)
