"""The benchmarks' statistics: noise ratios, intervals over pairs, steps to reach a loss. Plain numbers in and out.

Shapes: n gradients, d numbers in each, k gradients per plan.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from typing import NamedTuple

import scipy.stats
import torch
from torch import Tensor


class Estimate(NamedTuple):
    """A number with its 95 % interval."""

    value: float
    low: float
    high: float


def paired_interval(differences: Sequence[float]) -> Estimate:
    """The mean of paired differences with Student's 95 % interval.

    Raises:
        ValueError: There are fewer than two pairs.
    """
    count = len(differences)
    if count < 2:
        raise ValueError(f"Found {count} pairs; an interval needs at least two.")
    mean = statistics.fmean(differences)
    reach = float(scipy.stats.t.ppf(0.975, count - 1) * scipy.stats.sem(differences))
    return Estimate(mean, mean - reach, mean + reach)


def clopper_pearson(successes: int, trials: int) -> Estimate:
    """A share of trials with its exact 95 % interval, 2.5 % on either side.

    Source: Clopper & Pearson 1934.
    """
    interval = scipy.stats.binomtest(successes, trials).proportion_ci(0.95, method="exact")
    return Estimate(successes / trials, float(interval.low), float(interval.high))


def steps_to_reach(curve: Sequence[tuple[int, float]], target: float) -> float | None:
    """The first step at which a curve of (step, loss) is at or below a target, between points on a straight line.

    Returns:
        The step, or None if the curve never gets there.
    """
    for index, (step, loss) in enumerate(curve):
        if loss <= target:
            if index == 0:
                return float(step)
            before, higher = curve[index - 1]
            return before + (step - before) * (higher - target) / (higher - loss)
    return None


def noise_ratio(gram: Tensor, plans: Sequence[int], *, resamples: int = 400) -> dict[str, Estimate]:
    """tr Cov(g) / |E g|^2 of single batches, and of means over a plan's consecutive batches, times their number.

    |E g|^2 is the mean inner product of gradients from different plans, which are independent, so that it is
    unbiased; E |g|^2 is the mean of the squared lengths; their difference is tr Cov(g) without bias. (With plans of
    one gradient each it is the usual n / (n - 1) estimator.) For batches that are drawn independently both ratios
    are one number; where batches of a plan make up for one another, the second is lower, and it is what an optimizer
    sees that averages over steps. The intervals are a bootstrap over plans; a plan drawn twice is not paired with
    itself.

    Args:
        gram: Inner products of all pairs of gradients, (n, n) float64.
        plans: The plan of each gradient, n numbers from 0; every plan has k gradients.
        resamples: Draws of the bootstrap.

    Returns:
        "batch" and "window".

    Source: the simple noise scale of McCandlish et al. 1812.06162, equation 2.9.
    """
    number = torch.tensor(list(plans))
    count = int(number.max()) + 1
    member = torch.nn.functional.one_hot(number, count).to(gram.dtype)
    size = len(number) // count
    if not bool((member.sum(dim=0) == size).all()):
        raise ValueError("Every plan must have the same number of gradients.")
    between = member.T @ gram @ member / size**2  # inner products of the plans' mean gradients
    lengths = member.T @ gram.diagonal() / size

    def ratios(weights: Tensor) -> tuple[float, float]:
        pairs = torch.outer(weights, weights)
        pairs.fill_diagonal_(0.0)
        signal = (pairs * between).sum() / pairs.sum()
        total = weights.sum()
        batch = (weights * lengths).sum() / total - signal
        window = ((weights * between.diagonal()).sum() / total - signal) * size
        return float(batch / signal), float(window / signal)

    exact = ratios(torch.ones(count, dtype=gram.dtype))
    draw = random.Random(0)
    drawn = [ratios(_multiplicities(draw, count).to(gram.dtype)) for _ in range(resamples)]
    found = {}
    for index, name in enumerate(("batch", "window")):
        values = sorted(ratio[index] for ratio in drawn)
        found[name] = Estimate(exact[index], values[int(0.025 * resamples)], values[int(0.975 * resamples)])
    return found


def expected_gain(
    gram: Tensor, bins: Tensor, plans: Sequence[int], meetings: Tensor, batch_size: int, *, resamples: int = 200
) -> Estimate:
    """How many times less noise a batch has whose timesteps meet as they do, than one drawn by chance.

    Given their timesteps, the gradients of a batch are independent; so tr Cov of their mean is tr Cov(g) / B for one
    gradient, plus (B - 1) / B times the mean inner product of two of them less |E g|^2. By chance the latter is zero.
    Inner products are means over pairs from different plans, which are independent.

    Args:
        gram: Inner products of all pairs of single gradients, (n, n) float64.
        bins: The bin of each gradient's timestep, one-hot, (n, K); every bin is as likely as another.
        plans: The plan of each gradient, n numbers from 0.
        meetings: How often two members of a batch are in each pair of bins, (K, K), summing to 1.
        batch_size: B, at least 2.
        resamples: Draws of the bootstrap over plans.

    Source: the law of total covariance.
    """
    number = torch.tensor(list(plans))
    count = int(number.max()) + 1
    apart = (number[:, None] != number[None, :]).to(gram.dtype)
    products, lengths = gram * apart, gram.diagonal()

    def gain(weights: Tensor) -> float:
        weighted = bins * weights[number][:, None]
        between = (weighted.T @ products @ weighted) / (weighted.T @ apart @ weighted)
        signal = between.mean()
        single = ((weighted.T @ lengths) / weighted.sum(dim=0)).mean() - signal
        together = (meetings * between).sum() - signal
        return float(single / (single + (batch_size - 1) * together))

    draw = random.Random(0)
    values = sorted(gain(_multiplicities(draw, count).to(gram.dtype)) for _ in range(resamples))
    exact = gain(torch.ones(count, dtype=gram.dtype))
    return Estimate(exact, values[int(0.025 * resamples)], values[int(0.975 * resamples)])


def _multiplicities(draw: random.Random, count: int) -> Tensor:
    """How often each of `count` things comes up in as many draws."""
    return torch.bincount(torch.tensor([draw.randrange(count) for _ in range(count)]), minlength=count)


Curve = Sequence[tuple[float, float]]
"""(fidelity, copy rate) after every epoch."""


def copies_at_fidelity(curve: Curve, fidelity: float) -> float:
    """The copy rate where a curve first reaches a fidelity, between epochs on a straight line.

    Args:
        curve: Starts before training, at (0, 0).
        fidelity: At most the highest of the curve.

    Raises:
        ValueError: The curve never reaches it.
    """
    before = (0.0, 0.0)
    for point in curve:
        if point[0] >= fidelity:
            way = (fidelity - before[0]) / (point[0] - before[0]) if point[0] > before[0] else 1.0
            return before[1] + way * (point[1] - before[1])
        before = point
    raise ValueError(f"The curve ends below fidelity {fidelity}: {list(curve)}.")


def copies_saved(pairs: Sequence[tuple[Curve, Curve]], *, resamples: int = 1000) -> Estimate:
    """How much lower the copy rate is at equal fidelity, the mean curve of variants against that of references.

    The fidelity is the lower of both curves' highest. The interval is a bootstrap over pairs.

    Args:
        pairs: (reference, variant), trained on one concept with one seed.
        resamples: Draws of the bootstrap.

    Returns:
        The difference variant - reference; below 0 the variant copies less.
    """

    def mean(curves: Sequence[Curve]) -> Curve:
        return [
            (sum(point[0] for point in epoch) / len(epoch), sum(point[1] for point in epoch) / len(epoch))
            for epoch in zip(*curves, strict=True)
        ]

    def difference(drawn: Sequence[tuple[Curve, Curve]]) -> float:
        reference, variant = mean([pair[0] for pair in drawn]), mean([pair[1] for pair in drawn])
        fidelity = min(max(point[0] for point in reference), max(point[0] for point in variant))
        return copies_at_fidelity(variant, fidelity) - copies_at_fidelity(reference, fidelity)

    draw = random.Random(0)
    values = sorted(difference(draw.choices(list(pairs), k=len(pairs))) for _ in range(resamples))
    return Estimate(difference(pairs), values[int(0.025 * resamples)], values[int(0.975 * resamples)])
