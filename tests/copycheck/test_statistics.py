"""Probabilities against brute force, and against what they promise when there is nothing to find."""

import itertools
import math
from fractions import Fraction

import pytest
import torch

from sdlora.copycheck import statistics
from sdlora.copycheck.statistics import (
    above_zero_by_chance,
    binomial_tail,
    fisher_z,
    greater_by_chance,
    lower_bound,
    mcnemar,
    p_values,
    standing_out,
)


def test_one_score_gives_the_usual_p_value() -> None:
    null = torch.tensor([[0.1], [0.2], [0.3], [0.4]])
    seen = torch.tensor([[0.5], [0.35], [0.3], [0.0]])
    # An equal score counts as reached: 0.3 is reached by two of four.
    assert p_values(seen, null).tolist() == pytest.approx([1 / 5, 2 / 5, 3 / 5, 1.0])


def test_beyond_all_in_one_score_of_two_is_the_least_p_value() -> None:
    null = torch.rand(99, 2, generator=torch.Generator().manual_seed(1))
    assert float(p_values(torch.tensor([[2.0, 0.0]]), null)) == pytest.approx(0.01)


@pytest.mark.parametrize("dependence", [0.0, 0.9])
def test_false_alarms_are_as_many_as_promised(dependence: float) -> None:
    generator = torch.Generator().manual_seed(0)
    num_tries, alarms = 4000, 0
    for _ in range(num_tries):
        common = torch.randn(60, 1, generator=generator)
        scores = dependence * common + (1 - dependence) * torch.randn(60, 2, generator=generator)
        alarms += float(p_values(scores[:1], scores[1:])) <= 0.05
    # 60 exchangeable ones: the three most extreme have a p-value of 3/60 or less. Four standard errors around that.
    assert alarms / num_tries == pytest.approx(0.05, abs=4 * (0.05 * 0.95 / num_tries) ** 0.5)


def test_an_empty_null_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        p_values(torch.zeros(1, 1), torch.zeros(0, 1))


@pytest.mark.parametrize(("successes", "trials"), [(0, 3), (1, 3), (2, 8), (8, 8)])
def test_the_tail_is_the_sum_over_all_outcomes(successes: int, trials: int) -> None:
    chance = Fraction(1, 7)
    exact = sum(
        chance ** sum(outcome) * (1 - chance) ** (trials - sum(outcome))
        for outcome in itertools.product((0, 1), repeat=trials)
        if sum(outcome) >= successes
    )
    assert binomial_tail(successes, trials, 1 / 7) == pytest.approx(float(exact))


@pytest.mark.parametrize(("successes", "trials"), [(1, 1), (1, 8), (2, 8), (8, 8), (3, 300)])
def test_the_bound_is_where_the_tail_is_five_percent(successes: int, trials: int) -> None:
    bound = lower_bound(successes, trials)
    assert binomial_tail(successes, trials, bound) == pytest.approx(0.05, abs=1e-6)


def test_nothing_found_bounds_nothing_and_all_found_has_the_closed_form() -> None:
    assert lower_bound(0, 8) == 0.0
    assert lower_bound(4, 4) == pytest.approx(0.05**0.25)


def test_mcnemar_counts_only_pairs_that_differ() -> None:
    assert mcnemar(5, 0) == pytest.approx(1 / 32)
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(2, 2) > 0.5


def test_permutations_are_gone_through_where_they_are_few() -> None:
    assert greater_by_chance([3.0, 4.0], [1.0, 2.0]) == pytest.approx(1 / 6)
    assert greater_by_chance([1.0, 2.0], [3.0, 4.0]) == 1.0
    assert greater_by_chance([0.1, 0.1], [0.1, 0.1, 0.1]) == 1.0
    assert greater_by_chance([], [1.0]) == 1.0


def test_drawn_permutations_agree_with_a_large_sample_of_their_own() -> None:
    generator = torch.Generator().manual_seed(3)
    first = (torch.randn(20, generator=generator) + 0.5).tolist()
    second = torch.randn(20, generator=generator).tolist()
    everything = torch.tensor(first + second)
    shuffled = torch.stack([everything[torch.randperm(40, generator=generator)] for _ in range(20_000)])
    expected = float((shuffled[:, :20].sum(1) >= sum(first)).double().mean())
    assert greater_by_chance(first, second) == pytest.approx(expected, abs=0.006)


def test_signs_of_differences_by_brute_force() -> None:
    differences = [0.5, -0.2, 0.9, 0.1]
    sums = [
        sum(s * d for s, d in zip(signs, differences, strict=True)) for signs in itertools.product((1, -1), repeat=4)
    ]
    assert above_zero_by_chance(differences) == pytest.approx(sum(s >= sum(differences) - 1e-12 for s in sums) / 16)
    assert above_zero_by_chance([1.0, 2.0, 3.0]) == pytest.approx(1 / 8)
    assert above_zero_by_chance([-1.0, -2.0]) == above_zero_by_chance([]) == above_zero_by_chance([0.0] * 3) == 1.0


def test_drawn_signs_agree_with_all_signs(monkeypatch: pytest.MonkeyPatch) -> None:
    values = (torch.randn(12, generator=torch.Generator().manual_seed(4)) + 0.4).tolist()
    exact = above_zero_by_chance(values)
    monkeypatch.setattr(statistics, "_MOST_SPLITS", 1)
    assert above_zero_by_chance(values) == pytest.approx(exact, abs=0.02)
    assert above_zero_by_chance(values) == above_zero_by_chance(values)


def test_the_unit_is_the_way_to_the_95th_percentile() -> None:
    null = torch.arange(101.0)[:, None]
    assert standing_out(torch.tensor([[50.0], [95.0], [140.0]]), null)[:, 0].tolist() == [0.0, 1.0, 2.0]


def test_fishers_scale_is_the_area_hyperbolic_tangent_and_ends_before_infinity() -> None:
    values = torch.tensor([-0.9, 0.0, 0.5, 0.97])
    assert fisher_z(values).tolist() == pytest.approx([math.atanh(value) for value in values.tolist()])
    assert fisher_z(torch.tensor([1.0])).item() == pytest.approx(math.atanh(0.999))
