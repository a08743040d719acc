"""How often chance alone does as much: p-values and bounds, all exact, none from a table.

Pure. Shapes: P observed, K of the null, S scores of each.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

_MOST_SPLITS = 20_000
_NUM_DRAWN = 9_999
_FLAT = 1e-9
_NEARLY_ONE = 1 - 1e-3  # similarity of an image with itself is finite on Fisher's scale


def p_values(observed: Tensor, null: Tensor) -> Tensor:
    """How likely something of the null is as extreme as each one observed, several scores taken together.

    What counts is the score that stands out most: its distance from the median, in units of the distance from there
    to that score's 95th percentile, over the null and the observed one. So two scores cost no more false alarms than
    one, however much they depend on one another, and either alone can stand out.

    Args:
        observed: (P, S), the higher the more extreme.
        null: (K, S), K at least 1: scores of the same kind where there is nothing to find.

    Returns:
        (P,) float64 in [1 / (K + 1), 1].

    Raises:
        ValueError: The null is empty.

    Source: Westfall & Young 1993, "Resampling-Based Multiple Testing", chapter 2 (the maximum of several statistics,
    against its own distribution); the observed one is counted as in Phipson & Smyth 2010, equation 2.
    """
    if len(null) == 0:
        raise ValueError("The null is empty: nothing can be told from it.")
    # The observed one takes part in the scale, so that under the null all K + 1 are alike and the test is exact.
    everything = torch.cat([observed[:, None].double(), null.double().expand(len(observed), -1, -1)], dim=1)
    extreme = standing_out(everything, everything).amax(dim=2)  # (P, K + 1)
    return (extreme >= extreme[:, :1]).double().mean(dim=1)


def standing_out(scores: Tensor, null: Tensor) -> Tensor:
    """How far scores lie above the null's median, in units of the distance from there to its 95th percentile.

    The upper tail gives the unit because it is what a copy has to stand out from; a score in few steps, such as a
    hash's, can have a middle half that is narrower than one step.

    Args:
        scores: (..., N, S).
        null: (..., K, S).

    Returns:
        The shape of `scores`, float64.
    """
    ordered = null.double().sort(dim=-2).values
    count = ordered.shape[-2]
    middle, high = (ordered[..., [math.floor(share * (count - 1))], :] for share in (0.5, 0.95))
    return (scores.double() - middle) / (high - middle).clamp(min=_FLAT)


def fisher_z(correlations: Tensor) -> Tensor:
    """Correlations in [-1, 1] on a scale on which equal steps mean as much at the top as in the middle, float64.

    Source: Fisher 1915, "Frequency distribution of the values of the correlation coefficient": artanh r.
    """
    return correlations.double().clamp(-_NEARLY_ONE, _NEARLY_ONE).atanh()


def binomial_tail(successes: int, trials: int, chance: float) -> float:
    """How likely at least so many of some trials succeed, each with the same chance in [0, 1]."""
    terms = (
        math.comb(trials, k) * chance**k * (1.0 - chance) ** (trials - k) for k in range(max(0, successes), trials + 1)
    )
    return min(1.0, math.fsum(terms))


def lower_bound(successes: int, trials: int, confidence: float = 0.95) -> float:
    """The least chance of success that is not refuted by so few successes: a one-sided bound, in [0, 1].

    Source: Clopper & Pearson 1934, one side.
    """
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if binomial_tail(successes, trials, middle) < 1.0 - confidence:
            low = middle
        else:
            high = middle
    return low if successes > 0 else 0.0


def mcnemar(first_only: int, second_only: int) -> float:
    """How likely the first of two paired ways succeeds alone at least so often, if both are as good.

    Args:
        first_only: Pairs in which only the first succeeded.
        second_only: Pairs in which only the second did.

    Source: McNemar 1947, in its exact, one-sided form.
    """
    return binomial_tail(first_only, first_only + second_only, 0.5)


def greater_by_chance(first: Sequence[float], second: Sequence[float], seed: int = 0) -> float:
    """How likely the first group's mean exceeds the second's by as much, if which is in which group means nothing.

    Args:
        first: At least one value.
        second: At least one value.
        seed: For the splits that are drawn where there are too many to go through.

    Returns:
        The share of splits with at least this difference, the real one counted; 1 if either group is empty.

    Source: Fisher's permutation test, one-sided.
    """
    if not first or not second:
        return 1.0
    values = torch.tensor([*first, *second], dtype=torch.float64)
    size = len(first)
    seen = float(values[:size].sum())
    slack = 1e-9 * float(values.abs().sum())  # sums in another order differ by rounding
    if math.comb(len(values), size) <= _MOST_SPLITS:
        splits = torch.tensor(list(itertools.combinations(range(len(values)), size)))
        return float((values[splits].sum(dim=1) >= seen - slack).double().mean())
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(_NUM_DRAWN, len(values), generator=generator).argsort(dim=1)[:, :size]
    return float(((values[order].sum(dim=1) >= seen - slack).sum() + 1) / (_NUM_DRAWN + 1))


def above_zero_by_chance(differences: Sequence[float], seed: int = 0) -> float:
    """How likely the mean of paired differences is so far above zero, if each might as well have the other sign.

    Args:
        differences: One per pair.
        seed: For the signs that are drawn where there are too many to go through.

    Returns:
        The share of signs with at least this mean, the real ones counted; 1 if there are no differences.

    Source: Fisher's test of paired samples, "The Design of Experiments" (1935), section 21, one-sided.
    """
    values = torch.tensor(list(differences), dtype=torch.float64)
    seen, slack = float(values.sum()), 1e-9 * float(values.abs().sum())
    if 2 ** len(values) <= _MOST_SPLITS:
        signs = torch.tensor(list(itertools.product((1.0, -1.0), repeat=len(values))), dtype=torch.float64)
        return float((signs @ values >= seen - slack).double().mean())
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (_NUM_DRAWN, len(values)), generator=generator).double() * 2 - 1
    return float(((signs @ values >= seen - slack).sum() + 1) / (_NUM_DRAWN + 1))
