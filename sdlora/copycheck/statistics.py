"""p-values and confidence bounds of the copy check: exact where all cases can be enumerated, else by seeded draws.

Pure. Called by `scale`, `signals` and `verdict`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from scipy.stats import beta, binom
from torch import Tensor

_MOST_ENUMERATED = 20_000
_NUM_DRAWN = 9_999


def fisher_z(correlations: Tensor, most: float = 1 - 1e-3) -> Tensor:
    """Fisher's z of correlations in [-1, 1], which makes their variance nearly constant, float64.

    Args:
        most: Correlations count as no stronger, because the z of 1 is infinite.

    Source: Fisher 1915, "Frequency distribution of the values of the correlation coefficient": artanh r.
    """
    return correlations.double().clamp(-most, most).atanh()


def normal_tail(z: Tensor) -> Tensor:
    """The probability of a standard normal value of at least z, float64."""
    tail: Tensor = torch.special.ndtr(-z.double())
    return tail


def binomial_p_value(successes: int, trials: int, probability: float) -> float:
    """p-value of at least this many successes, each trial succeeding with a probability in [0, 1]."""
    return float(binom.sf(successes - 1, trials, probability))


def lower_bound(successes: int, trials: int, confidence: float) -> float:
    """One-sided lower confidence bound of a binomial proportion, in [0, 1].

    The quantile of a beta distribution is exact; `scipy.stats.binomtest` searches for it to 2e-12.

    Source: Clopper & Pearson 1934, one side.
    """
    return float(beta.ppf(1.0 - confidence, successes, trials - successes + 1)) if successes > 0 else 0.0


def upper_bound(successes: int, trials: int, confidence: float) -> float:
    """One-sided upper confidence bound of a binomial proportion, in [0, 1].

    Source: Clopper & Pearson 1934, one side.
    """
    return float(beta.ppf(confidence, successes + 1, trials - successes)) if successes < trials else 1.0


def mcnemar(first_only: int, second_only: int) -> float:
    """p-value of the first of two paired methods succeeding more often, from the pairs in which only one succeeded.

    Source: McNemar 1947, in its exact, one-sided form.
    """
    return binomial_p_value(first_only, first_only + second_only, 0.5)


# `scipy.stats.permutation_test` is not used: its tolerance for ties is relative to the statistic, so that rounding
# decides ties around zero (23 of 600 tests of values with one decimal were off, by up to 0.11), and its draws would
# move the p-values of earlier runs.


def permutation_test(first: Sequence[float], second: Sequence[float]) -> float:
    """One-sided permutation test: p-value of mean(first) > mean(second).

    Returns:
        The share of permutations whose difference is at least the observed one, which is counted, in (0, 1]; 1 if
        either group is empty.

    Source: Fisher's permutation test.
    """
    if not first or not second:
        return 1.0
    values = torch.tensor([*first, *second], dtype=torch.float64)
    size = len(first)
    exact = math.comb(len(values), size) <= _MOST_ENUMERATED
    if exact:
        members = torch.tensor(list(itertools.combinations(range(len(values)), size)))
    else:
        draws = torch.rand(_NUM_DRAWN, len(values), generator=torch.Generator().manual_seed(0))
        members = draws.argsort(dim=1)[:, :size]
    return _share_at_least(values[members].sum(dim=1), values[:size].sum(), values, exact)


def sign_flip_test(differences: Sequence[float]) -> float:
    """One-sided sign-flip test of paired differences: p-value of their mean being above zero.

    Returns:
        The share of sign patterns whose mean is at least the observed one, which is counted, in (0, 1]; 1 if there
        are no differences.

    Source: Fisher's test of paired samples, "The Design of Experiments" (1935), section 21.
    """
    values = torch.tensor(list(differences), dtype=torch.float64)
    exact = 2 ** len(values) <= _MOST_ENUMERATED
    if exact:
        signs = torch.tensor(list(itertools.product((1.0, -1.0), repeat=len(values))), dtype=torch.float64)
    else:
        draws = torch.randint(0, 2, (_NUM_DRAWN, len(values)), generator=torch.Generator().manual_seed(0))
        signs = draws.double() * 2 - 1
    return _share_at_least(signs @ values, values.sum(), values, exact)


def _share_at_least(sums: Tensor, observed: Tensor, values: Tensor, exact: bool) -> float:
    """The share of sums that reach the observed one, which is counted as well if the sums are drawn."""
    reached = sums >= observed - 1e-9 * values.abs().sum()  # sums in another order differ by rounding
    return float(reached.double().mean()) if exact else float((reached.sum() + 1) / (_NUM_DRAWN + 1))
