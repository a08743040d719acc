"""Sums, truncations and differences of LoRAs, as mathematics of their updates.

The update of a module is Delta = (alpha / r) B A. Everything computed here is in float64, and given back in
float32 with one alpha for the whole LoRA: diffusers reads only one for all attention layers of a file.
Shapes: i in (with kernels: i k k), o out, r rank, k kernel.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sdlora.errors import ConfigError, DataError
from sdlora.lora.inject import LoraState, LoraWeights


@dataclass
class Cost:
    """How much of the updates was lost by giving them fewer ranks.

    Attributes:
        total: Sum of the squared singular values of every module.
        lost: Those of them that were cut off.
        worst: The largest relative error of a module, sqrt(lost / total) of its own.
        worst_module: Which module that is.
        ranks: How many ranks each module has now.
    """

    total: float = 0.0
    lost: float = 0.0
    worst: float = 0.0
    worst_module: str | None = None
    ranks: dict[str, int] = field(default_factory=dict)

    def add(self, module: str, energies: Tensor, rank: int) -> None:
        """Count a module's squared singular values (r,), largest first, of which the first `rank` were kept."""
        total, lost = float(energies.sum()), float(energies[rank:].sum())
        error = (lost / total) ** 0.5 if total > 0 else 0.0
        self.total, self.lost = self.total + total, self.lost + lost
        self.ranks[module] = rank
        if error > self.worst:
            self.worst, self.worst_module = error, module

    @property
    def relative_error(self) -> float:
        """The norm of what was cut off from all modules, as a share of the whole norm."""
        return float((self.lost / self.total) ** 0.5) if self.total > 0 else 0.0

    @property
    def kept_energy(self) -> float:
        """The share of the squared singular values that was kept."""
        return 1.0 - self.lost / self.total if self.total > 0 else 1.0


def update(weights: LoraWeights) -> Tensor:
    """Delta = (alpha / r) B A, in float64, (o, i)."""
    scale = weights.alpha / weights.down.shape[0]
    return scale * (weights.up.double().flatten(1) @ weights.down.double().flatten(1))


def refuse_dora(state: LoraState, name: str) -> None:
    """Refuse what is no sum of updates.

    Raises:
        DataError: The LoRA has magnitudes.
    """
    dora = [module for module, weights in state.items() if weights.magnitude is not None]
    if dora:
        raise DataError(
            f"{name} is DoRA, among others in {dora[0]!r}: its update depends on the base's weights and is no product "
            "B A. It can be converted to PEFT's names, and nothing else."
        )


def merge(states: Sequence[LoraState], weights: Sequence[float], rank: int | None = None) -> tuple[LoraState, Cost]:
    """The weighted sum of LoRAs: exact by laying ranks side by side, or cut to a rank.

    Args:
        states: LoRAs by kohya module name, without magnitudes.
        weights: One factor per LoRA.
        rank: At most this many ranks per module; None for all of them.

    Returns:
        The sum; one LoRA of weight 1 and no `rank` comes back as it is. And what the rank cost.

    Raises:
        DataError: A module has another shape in one LoRA than in another.
    """
    if len(states) == 1 and weights[0] == 1.0 and rank is None:
        return states[0], Cost()
    sums: dict[str, LoraWeights] = {}
    for module in dict.fromkeys(module for state in states for module in state):
        terms = [(state[module], w) for state, w in zip(states, weights, strict=True) if module in state]
        sums[module] = _sum(module, terms)
    if rank is not None:
        return resize(sums, rank=rank)
    return _with_one_alpha(sums), Cost()


def _sum(module: str, terms: Sequence[tuple[LoraWeights, float]]) -> LoraWeights:
    shapes = [(tuple(w.down.shape[1:]), w.up.shape[0]) for w, _ in terms]
    if len(set(shapes)) > 1:
        raise DataError(
            f"These LoRAs are of different families: {module!r} takes {shapes[0][0]} and gives {shapes[0][1]} in one, "
            f"and {shapes[1][0]} and {shapes[1][1]} in another."
        )
    down = torch.cat([w.down.double() for w, _ in terms])
    up = torch.cat([w.up.double() * (w.alpha / w.down.shape[0] * factor) for w, factor in terms], dim=1)
    return LoraWeights(down, up, float(down.shape[0]))


def _with_one_alpha(state: LoraState) -> LoraState:
    """The same updates in float32, with the largest rank as everyone's alpha; B takes the difference in."""
    alpha = float(max(weights.down.shape[0] for weights in state.values()))
    found: LoraState = {}
    for module, weights in state.items():
        up = weights.up.double() * (weights.alpha / alpha)
        found[module] = LoraWeights(weights.down.float(), up.float(), alpha)
    return found


def resize(state: LoraState, *, rank: int | None = None, energy: float | None = None) -> tuple[LoraState, Cost]:
    """The nearest LoRA of fewer ranks, by the singular values of every module's update.

    Args:
        state: A LoRA without magnitudes.
        rank: At most this many ranks per module.
        energy: Or as few as keep this share of a module's squared singular values, in (0, 1].

    Returns:
        The smaller LoRA and what was lost.

    Raises:
        ConfigError: Not exactly one of `rank` and `energy` is given, or it is out of its range.

    Source:
        Eckart and Young 1936: no matrix of rank n is nearer in Frobenius' norm.
    """
    _check_measure(rank, energy)
    cost, found = Cost(), {}
    for module, weights in state.items():
        # Singular values of B A from those of two small triangles: B = Q R, A^T = P T, so that B A = Q (R T^T) P^T.
        up_q, up_r = torch.linalg.qr(weights.up.double().flatten(1))
        down_q, down_r = torch.linalg.qr(weights.down.double().flatten(1).T)
        left, values, right = torch.linalg.svd(up_r @ down_r.T * (weights.alpha / weights.down.shape[0]))
        left, right = left[:, : len(values)], right[: len(values)]
        kept = min(rank, len(values)) if rank is not None else _rank_of(values.square(), energy or 1.0)
        cost.add(module, values.square(), kept)
        found[module] = _factors(up_q @ left, values, right @ down_q.T, kept, weights.down.shape[1:])
    return _with_one_alpha(found), cost


def _check_measure(rank: int | None, energy: float | None) -> None:
    if (rank is None) == (energy is None):
        raise ConfigError("Say either --rank N or --energy SHARE, and not both.")
    if rank is not None and rank < 1:
        raise ConfigError(f"--rank is {rank}: it takes 1 and more.")
    if energy is not None and not 0 < energy <= 1:
        raise ConfigError(f"--energy is {energy}: it takes a share above 0 and up to 1, such as 0.99.")


def _rank_of(energies: Tensor, share: float) -> int:
    """How many of the energies, largest first, make the share."""
    sums = energies.cumsum(0)
    return min(int((sums < share * sums[-1]).sum()) + 1, len(energies))


def _factors(left: Tensor, values: Tensor, right: Tensor, rank: int, inputs: Sequence[int]) -> LoraWeights:
    """The first ranks of left diag(values) right as A and B, each with the root of the singular values."""
    root = values[:rank].sqrt()
    up, down = left[:, :rank] * root, root[:, None] * right[:rank]
    kernel = (1,) * (len(inputs) - 1)
    return LoraWeights(down.reshape(rank, *inputs), up.reshape(up.shape[0], rank, *kernel), float(rank))


def extract(differences: Iterable[tuple[str, Tensor]], rank: int) -> tuple[LoraState, Cost]:
    """The nearest LoRA to differences of weights.

    Args:
        differences: Kohya module names with fine-tuned minus base, (o, i) or (o, i, k, k).
        rank: At most this many ranks per module.

    Returns:
        The LoRA, without modules that do not differ, and what of the differences it lacks.

    Raises:
        ConfigError: The rank is below 1.
        DataError: No module differs.
    """
    _check_measure(rank, None)
    cost, found = Cost(), {}
    for module, difference in differences:
        if not difference.any():
            continue
        left, values, right = _svd(difference.float().flatten(1))
        kept = min(rank, len(values))
        cost.add(module, values.double().square(), kept)
        found[module] = _factors(left, values, right, kept, difference.shape[1:])
    if not found:
        raise DataError("The two bases have the same weights in every layer that a LoRA can change.")
    return _with_one_alpha(found), cost


def _svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The thin SVD of a whole matrix, in its own precision: float64 would take minutes for a base's largest layers."""
    if matrix.shape[0] > matrix.shape[1]:
        left, values, right = _svd(matrix.T)
        return right.T, values, left.T
    # Six times as fast as the SVD of a convolution's wide matrix itself.
    wide, square = torch.linalg.qr(matrix.T)
    left, values, right = torch.linalg.svd(square.T)
    return left, values, right @ wide.T
