"""p-values and bounds against exact fractions, brute force and scipy, and their false alarm rate under the null."""

import itertools
import math
from fractions import Fraction

import pytest
import scipy.stats
import torch

from sdlora.copycheck import statistics
from sdlora.copycheck.statistics import (
    fisher_z,
    lower_bound,
    mcnemar,
    normal_tail,
    permutation_test,
    sign_flip_test,
)


@pytest.mark.parametrize(("successes", "trials"), [(1, 1), (1, 8), (2, 8), (8, 8), (3, 300)])
@pytest.mark.parametrize("confidence", [0.95, 0.999])
def test_lower_bound_is_the_proportion_whose_exact_tail_is_the_error_rate(
    successes: int, trials: int, confidence: float
) -> None:
    bound = Fraction(lower_bound(successes, trials, confidence))
    terms = (math.comb(trials, k) * bound**k * (1 - bound) ** (trials - k) for k in range(successes, trials + 1))
    assert float(sum(terms)) == pytest.approx(1 - confidence, rel=1e-10)


def test_lower_bound_of_no_success_is_zero_and_of_all_has_the_closed_form() -> None:
    assert lower_bound(0, 8, 0.95) == 0.0
    assert lower_bound(4, 4, 0.95) == pytest.approx(0.05**0.25)


def test_mcnemar_counts_only_discordant_pairs() -> None:
    assert mcnemar(5, 0) == pytest.approx(1 / 32)
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(2, 2) > 0.5


def test_permutation_test_of_small_groups_is_exact() -> None:
    assert permutation_test([3.0, 4.0], [1.0, 2.0]) == pytest.approx(1 / 6)
    assert permutation_test([1.0, 2.0], [3.0, 4.0]) == 1.0
    assert permutation_test([0.1, 0.1], [0.1, 0.1, 0.1]) == 1.0
    assert permutation_test([], [1.0]) == 1.0


def test_permutation_test_of_large_groups_agrees_with_scipy() -> None:
    generator = torch.Generator().manual_seed(3)
    first = (torch.randn(20, generator=generator) + 0.5).tolist()
    second = torch.randn(20, generator=generator).tolist()
    reference = scipy.stats.permutation_test(
        (first, second), lambda x, y, axis: x.mean(axis=axis) - y.mean(axis=axis), vectorized=True,
        alternative="greater", n_resamples=20_000, rng=0,
    )  # fmt: skip
    assert permutation_test(first, second) == pytest.approx(reference.pvalue, abs=0.006)


def test_permutation_test_counts_ties_around_zero_exactly() -> None:
    """Sums that are equal but for rounding are ties; scipy's tolerance is relative and misses them."""
    values = [-0.3, 0.1, 0.2, 0.0, 0.4, -0.4, 0.3, -0.3]
    tenths = [round(10 * value) for value in values]
    splits = list(itertools.combinations(tenths, 4))
    expected = sum(sum(split) >= sum(tenths[:4]) for split in splits) / len(splits)
    assert permutation_test(values[:4], values[4:]) == pytest.approx(expected)


def test_sign_flip_test_equals_brute_force() -> None:
    differences = [0.5, -0.2, 0.9, 0.1]
    sums = [
        sum(s * d for s, d in zip(signs, differences, strict=True)) for signs in itertools.product((1, -1), repeat=4)
    ]
    assert sign_flip_test(differences) == pytest.approx(sum(s >= sum(differences) - 1e-12 for s in sums) / 16)
    assert sign_flip_test([1.0, 2.0, 3.0]) == pytest.approx(1 / 8)
    assert sign_flip_test([-1.0, -2.0]) == sign_flip_test([]) == sign_flip_test([0.0] * 3) == 1.0


def test_sign_flip_test_by_draws_agrees_with_enumeration(monkeypatch: pytest.MonkeyPatch) -> None:
    values = (torch.randn(12, generator=torch.Generator().manual_seed(4)) + 0.4).tolist()
    exact = sign_flip_test(values)
    monkeypatch.setattr(statistics, "_MOST_ENUMERATED", 1)
    assert sign_flip_test(values) == pytest.approx(exact, abs=0.02)
    assert sign_flip_test(values) == sign_flip_test(values)


def test_normal_tail_agrees_with_scipy() -> None:
    values = torch.tensor([-1.0, 0.0, 2.326, 8.0])
    assert normal_tail(values).tolist() == pytest.approx(scipy.stats.norm.sf(values.double().numpy()), rel=1e-6)


def test_fisher_z_is_artanh_and_finite_at_one() -> None:
    values = torch.tensor([-0.9, 0.0, 0.5, 0.97])
    assert fisher_z(values).tolist() == pytest.approx([math.atanh(value) for value in values.tolist()])
    assert fisher_z(torch.tensor([1.0])).item() == pytest.approx(math.atanh(0.999))
