"""Sums, truncations and differences of LoRAs: the mathematics behind `sdlora merge`, `resize` and `extract`.

A module's update is Delta = (alpha / r) B A. Computed in float64 and returned in float32 with one alpha for the whole
LoRA, because diffusers reads only one for all attention layers of a file.
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
    """What lowering the ranks of a LoRA costs."""

    total: float = 0.0  # sum of all modules' squared singular values
    lost: float = 0.0  # sum of those that were cut off
    worst: float = 0.0  # largest relative error of a module, sqrt(its lost / its total), in [0, 1]
    worst_module: str | None = None  # the module with that error
    ranks: dict[str, int] = field(default_factory=dict)  # new rank of each module

    def add(self, module: str, energies: Tensor, rank: int) -> None:
        """Add a module's squared singular values (r,), largest first, of which the first `rank` are kept."""
        total, lost = float(energies.sum()), float(energies[rank:].sum())
        error = (lost / total) ** 0.5 if total > 0 else 0.0
        self.total, self.lost = self.total + total, self.lost + lost
        self.ranks[module] = rank
        if error > self.worst:
            self.worst, self.worst_module = error, module

    @property
    def relative_error(self) -> float:
        """Frobenius norm of what was cut off, as a share of the whole, in [0, 1]."""
        return float((self.lost / self.total) ** 0.5) if self.total > 0 else 0.0

    @property
    def kept_energy(self) -> float:
        """Share of the squared singular values that is kept, in [0, 1]."""
        return 1.0 - self.lost / self.total if self.total > 0 else 1.0


def update(weights: LoraWeights) -> Tensor:
    """Delta = (alpha / r) B A, (o, i) float64.

    Source: Hu et al. 2106.09685, equation 3.
    """
    scale = weights.alpha / weights.down.shape[0]
    return scale * (weights.up.double().flatten(1) @ weights.down.double().flatten(1))


def refuse_dora(state: LoraState, name: str) -> None:
    """Refuse a DoRA, with a `DataError`, where a sum of updates is needed."""
    dora = [module for module, weights in state.items() if weights.magnitude is not None]
    if dora:
        raise DataError(
            f"{name} is DoRA (its first such module is {dora[0]!r}), whose update depends on the base model's weights. "
            "It can be converted to PEFT's or kohya's names, but not merged or resized."
        )


def merge(states: Sequence[LoraState], weights: Sequence[float], rank: int | None = None) -> tuple[LoraState, Cost]:
    """The weighted sum of LoRAs without magnitudes, and its cost; a single one of weight 1 stays as it is.

    Args:
        states: By kohya module name.
        weights: One factor per LoRA.
        rank: Largest rank per module; None concatenates all ranks, which is exact.

    Raises:
        DataError: A module has different shapes in two LoRAs.
    """
    if len(states) == 1 and weights[0] == 1.0 and rank is None:
        return states[0], Cost()
    sums: dict[str, LoraWeights] = {}
    for module in dict.fromkeys(module for state in states for module in state):
        terms = [(state[module], w) for state, w in zip(states, weights, strict=True) if module in state]
        shapes = [(tuple(w.down.shape[1:]), w.up.shape[0]) for w, _ in terms]
        if len(set(shapes)) > 1:
            raise DataError(
                f"cannot add LoRAs of different families: {module!r} has the inputs {shapes[0][0]} and {shapes[0][1]} "
                f"outputs in one, {shapes[1][0]} and {shapes[1][1]} in another"
            )
        down = torch.cat([w.down.double() for w, _ in terms])
        up = torch.cat([w.up.double() * (w.alpha / w.down.shape[0] * factor) for w, factor in terms], dim=1)
        sums[module] = LoraWeights(down, up, float(down.shape[0]))
    return (_with_one_alpha(sums), Cost()) if rank is None else resize(sums, rank=rank)


def _with_one_alpha(state: LoraState) -> LoraState:
    """The same updates in float32, with the largest rank as alpha of every module; B absorbs the difference."""
    alpha = float(max(weights.down.shape[0] for weights in state.values()))
    return {
        module: LoraWeights(w.down.float(), (w.up.double() * (w.alpha / alpha)).float(), alpha)
        for module, w in state.items()
    }


def resize(state: LoraState, *, rank: int | None = None, energy: float | None = None) -> tuple[LoraState, Cost]:
    """The nearest LoRA of fewer ranks, by the singular values of every module's update, and what that cost.

    Args:
        state: A LoRA without magnitudes.
        rank: Largest rank per module.
        energy: Instead of `rank`, keep as few ranks as hold this share of the squared singular values, in (0, 1].

    Raises:
        ConfigError: Not exactly one of `rank` and `energy` is given, or it is out of its range.

    Source: Eckart and Young 1936: no matrix of that rank is nearer in the Frobenius norm.
    """
    _check_measure(rank, energy)
    cost, found = Cost(), {}
    for module, weights in state.items():
        # Singular values of B A from those of two small triangles: B = Q R, A^T = P T, so that B A = Q (R T^T) P^T.
        up_q, up_r = torch.linalg.qr(weights.up.double().flatten(1))
        down_q, down_r = torch.linalg.qr(weights.down.double().flatten(1).T)
        left, values, right = torch.linalg.svd(up_r @ down_r.T * (weights.alpha / weights.down.shape[0]))
        left, right = left[:, : len(values)], right[: len(values)]
        energies = values.square()
        sums = energies.cumsum(0)
        kept = rank or int((sums < (energy or 1.0) * sums[-1]).sum()) + 1
        kept = min(kept, len(values))
        cost.add(module, energies, kept)
        found[module] = _factors(up_q @ left, values, right @ down_q.T, kept, weights.down.shape[1:])
    return _with_one_alpha(found), cost


def _check_measure(rank: int | None, energy: float | None) -> None:
    if (rank is None) == (energy is None):
        raise ConfigError("Give either --rank N or --energy SHARE, not both.")
    if rank is not None and rank < 1:
        raise ConfigError(f"--rank must be at least 1, found {rank}")
    if energy is not None and not 0 < energy <= 1:
        raise ConfigError(f"--energy must be above 0 and at most 1, such as 0.99, found {energy}")


def _factors(left: Tensor, values: Tensor, right: Tensor, rank: int, inputs: Sequence[int]) -> LoraWeights:
    """The first ranks of left diag(values) right as A and B, each scaled by the root of the singular values."""
    root = values[:rank].sqrt()
    up, down = left[:, :rank] * root, root[:, None] * right[:rank]
    kernel = (1,) * (len(inputs) - 1)
    return LoraWeights(down.reshape(rank, *inputs), up.reshape(up.shape[0], rank, *kernel), float(rank))


def extract(differences: Iterable[tuple[str, Tensor]], rank: int) -> tuple[LoraState, Cost]:
    """The LoRA that is nearest to differences of weights, without modules that do not differ, and what its rank cost.

    Args:
        differences: Kohya module names with fine-tuned minus base, (o, i) or (o, i, k, k).
        rank: Largest rank per module.

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
        raise DataError("The two base models have the same weights in every layer that a LoRA can change.")
    return _with_one_alpha(found), cost


def _svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The thin SVD of a matrix, in its own precision: float64 would take minutes for a base's largest layers."""
    if matrix.shape[0] > matrix.shape[1]:
        left, values, right = _svd(matrix.T)
        return right.T, values, left.T
    # Six times as fast as the SVD of a convolution's wide matrix itself.
    wide, square = torch.linalg.qr(matrix.T)
    left, values, right = torch.linalg.svd(square.T)
    return left, values, right @ wide.T
