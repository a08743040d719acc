"""p-values and confidence bounds of the copy check: exact where all cases can be enumerated, else by seeded draws.

Pure. Called by `signals` and `verdict`. Shapes: P observed, K of the null distribution, S scores of each.
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
_FLAT = 1e-9
_NEARLY_ONE = 1 - 1e-3  # keeps an image's similarity to itself finite on Fisher's scale


def p_values(observed: Tensor, null: Tensor) -> Tensor:
    """p-value of each observation against a null distribution, over several scores at once.

    The statistic is the largest standardized score (`standardize`, over the null and the observation together). So
    several scores cause no more false alarms than one, however correlated they are, and any one of them can stand out.

    Args:
        observed: (P, S); higher is more extreme.
        null: (K, S), K at least 1: the same scores where there is nothing to find.

    Returns:
        (P,) float64 in [1 / (K + 1), 1].

    Raises:
        ValueError: The null distribution is empty.

    Source: Westfall & Young 1993, "Resampling-Based Multiple Testing", chapter 2 (the maximum of several statistics
    against its own distribution); the observation is counted as in Phipson & Smyth 2010, equation 2.
    """
    if len(null) == 0:
        raise ValueError("The null distribution is empty; it needs at least one score.")
    # The observation takes part in the scale: then all K + 1 are exchangeable under the null and the test is exact.
    everything = torch.cat([observed[:, None].double(), null.double().expand(len(observed), -1, -1)], dim=1)
    extreme = standardize(everything, everything).amax(dim=2)  # (P, K + 1)
    return (extreme >= extreme[:, :1]).double().mean(dim=1)


def standardize(scores: Tensor, null: Tensor) -> Tensor:
    """Distance of scores from the null's median, in units of the distance from there to its 95th percentile.

    The upper tail is the unit because a copy has to exceed it, and because a score with few values, such as a hash's,
    may have an interquartile range of zero.

    Args:
        scores: (..., N, S).
        null: (..., K, S).

    Returns:
        The shape of `scores`, float64.
    """
    ordered = null.double().sort(dim=-2).values
    count = ordered.shape[-2]
    median, high = (ordered[..., [math.floor(share * (count - 1))], :] for share in (0.5, 0.95))
    return (scores.double() - median) / (high - median).clamp(min=_FLAT)


def fisher_z(correlations: Tensor) -> Tensor:
    """Fisher's z of correlations in [-1, 1], which makes their variance nearly constant, float64.

    Source: Fisher 1915, "Frequency distribution of the values of the correlation coefficient": artanh r.
    """
    return correlations.double().clamp(-_NEARLY_ONE, _NEARLY_ONE).atanh()


def binomial_p_value(successes: int, trials: int, probability: float) -> float:
    """p-value of at least this many successes, each trial succeeding with a probability in [0, 1]."""
    return float(binom.sf(successes - 1, trials, probability))


def lower_bound(successes: int, trials: int, confidence: float) -> float:
    """One-sided lower confidence bound of a binomial proportion, in [0, 1].

    The quantile of a beta distribution is exact; `scipy.stats.binomtest` searches for it to 2e-12.

    Source: Clopper & Pearson 1934, one side.
    """
    return float(beta.ppf(1.0 - confidence, successes, trials - successes + 1)) if successes > 0 else 0.0


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
