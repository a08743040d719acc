"""Timestep-dependent ranks (T-LoRA): all ranks at low noise, fewer at high noise.

An `Adapter` masks its layers' ranks with it at every call of the network. Flow-matching models train most steps at high
noise, which would leave most ranks untrained: there the share of steps at less noise takes the timestep's place.
Shapes: B batch, r rank, T timesteps.
"""

from __future__ import annotations

import inspect
import json
import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sdlora.errors import DataError

Told = Literal["timestep", "noise share", "image share"]
"""What a network takes as its time: t for UNets; for flow matching s or 1 - s, where s = (t + 1) / T."""
_NUM_TIMESTEPS = 1000
_NUM_SLICES = 100


@dataclass(frozen=True)
class TimestepRank:
    """Settings of timestep-dependent ranks."""

    rank_min: int  # r_min, the number of ranks at the highest noise, at least 1 and at most r
    alpha: float  # exponent of the fall of ranks with noise, above 0; 1 is linear
    told: Told = "timestep"
    # Timesteps between which equal shares of the training steps lie, ascending in [0, T]; evenly spaced if empty.
    quantiles: tuple[float, ...] = ()


def quantiles_of(edges: Sequence[float]) -> tuple[float, ...]:
    """The timesteps at equally spaced quantiles of a density, (101,), from its CDF at the edges of all, (T + 1,)."""
    found = []
    for quantile in (index / _NUM_SLICES for index in range(_NUM_SLICES + 1)):
        above = max(1, bisect_left(edges, quantile)) if quantile else bisect_left(edges, 1e-12)
        low, high = edges[above - 1], edges[above]
        found.append(round(above - 1 + (quantile - low) / (high - low), 4))
    return tuple(found)


def timestep_rank_in(metadata: Mapping[str, str], file: str) -> TimestepRank | None:
    """The setting that a LoRA file was trained with, or None for all ranks at every timestep; `file` is its name.

    Raises:
        DataError: The metadata is not as sdlora writes it.
    """
    keys = ("min", "alpha", "told", "quantiles")
    written = [metadata.get(f"sdlora.timestep_rank_{key}") for key in keys]
    if written == [None] * len(keys):
        return None
    lowest, alpha, told, quantiles = written
    try:
        numbers = tuple(map(float, json.loads(quantiles or "[]")))
        setting = TimestepRank(int(lowest or ""), float(alpha or ""), cast(Told, told or "timestep"), numbers)
    except (ValueError, TypeError, RecursionError):
        setting = TimestepRank(0, 0.0)
    if setting.rank_min < 1 or not 0 < setting.alpha < math.inf:
        raise DataError(
            f"{file}: the metadata has the timestep rank minimum {lowest!r} and alpha {alpha!r}; they must be "
            "an integer of at least 1 and a number above 0. The file was changed after training; export it again."
        )
    ordered = all(low <= high for low, high in pairwise((0.0, *setting.quantiles, float(_NUM_TIMESTEPS))))
    if setting.told not in get_args(Told) or not ordered or len(setting.quantiles) == 1:
        raise DataError(
            f"{file}: the metadata says at which noise its ranks were trained in a way that cannot be read. The file "
            "was changed after training; export it again."
        )
    return setting


def timestep_rank_metadata(setting: TimestepRank) -> dict[str, str]:
    """The metadata of a LoRA file that `timestep_rank_in` reads."""
    written = {"min": str(setting.rank_min), "alpha": str(setting.alpha)}
    if setting.quantiles:
        written |= {"told": setting.told, "quantiles": json.dumps(setting.quantiles)}
    return {f"sdlora.timestep_rank_{key}": value for key, value in written.items()}


def active_ranks(timesteps: Tensor, rank: int, setting: TimestepRank) -> Tensor:
    """Number of ranks of each sample: floor(((T - t) / T)^alpha (r - r_min)) + r_min.

    With quantiles, 1 - F(t) takes the place of (T - t) / T, where F(t) is the share of training steps below t; the two
    are the same for the uniform density. So rank j > r_min is trained in the share
    1 - ((j - r_min) / (r - r_min))^(1 / alpha) of the steps, however a shift moves them.

    Args:
        timesteps: t in [0, T - 1], (B,), where T is 1000.
        rank: r, at least r_min.

    Returns:
        Integers in [r_min, r], (B,).

    Source: Soboleva et al. 2507.05964, equation 5.
    """
    if setting.quantiles:
        share = (1 - _share_below(timesteps.double(), setting.quantiles)) ** setting.alpha
    else:
        share = ((_NUM_TIMESTEPS - timesteps.double()) / _NUM_TIMESTEPS) ** setting.alpha
    return torch.floor(share * (rank - setting.rank_min)).long() + setting.rank_min


def rank_mask(timesteps: Tensor, rank: int, setting: TimestepRank) -> Tensor:
    """The mask of each sample's first ranks that are in use, (B, r) float32 of ones and zeros."""
    active = active_ranks(timesteps, rank, setting)
    return (torch.arange(rank, device=timesteps.device) < active[:, None]).float()


def _share_below(timesteps: Tensor, quantiles: Sequence[float]) -> Tensor:
    """F(t) of timesteps (B,) in float64, linear between quantiles."""
    edges = torch.tensor(quantiles, dtype=torch.float64, device=timesteps.device)
    above = torch.searchsorted(edges, timesteps, right=True).clamp(1, len(edges) - 1)
    low, high = edges[above - 1], edges[above]
    return ((above - 1 + (timesteps - low) / (high - low).clamp(min=1e-9)) / (len(edges) - 1)).clamp(0, 1)


def watch_timesteps(network: nn.Module, callback: Callable[[Tensor], None], told: Told = "timestep") -> RemovableHandle:
    """Call back with the timesteps of every forward pass of a network before it begins, until the handle is removed.

    Args:
        network: Called as in diffusers: what is denoised comes first, as a tensor or a list of them.
        callback: Receives the timesteps of all samples, (B,), even if one timestep is given for all.
        told: What the network takes as its time.
    """
    _, first, *rest = inspect.signature(type(network).forward).parameters
    name = "timestep" if "timestep" in rest else "t"
    place = 1 + rest.index(name) if name in rest else 1

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        sample = args[0] if args else kwargs[first]
        given = args[place] if len(args) > place else kwargs[name]
        timesteps = torch.as_tensor(given, device=sample[0].device)
        if told != "timestep":
            share = timesteps.double() if told == "noise share" else 1 - timesteps.double()
            # To a thousandth of a timestep, which is more than float32 leaves of them.
            timesteps = (share * _NUM_TIMESTEPS - 1).mul(1000).round().div(1000)
        callback(timesteps.reshape(-1).expand(len(sample)))

    return network.register_forward_pre_hook(hook, with_kwargs=True, prepend=True)
