"""Losses and weights against the papers' formulas in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sdlora.diffusion.flow import FlowLevels, level
from sdlora.diffusion.losses import huber_delta, huber_per_example, loss_weight, mean_per_example, mse_per_example
from sdlora.diffusion.noise import DdpmLevels, PredictionType
from sdlora.pocket.architecture import build_scheduler


def test_mse_is_per_example_in_float32() -> None:
    target = torch.zeros(2, 4, 3, 3)
    predicted = torch.stack([torch.full((4, 3, 3), 0.5), torch.full((4, 3, 3), -2.0)]).bfloat16()
    losses = mse_per_example(predicted, target)
    assert losses.dtype == torch.float32
    assert losses.tolist() == [0.25, 4.0]


def test_huber_is_squared_below_delta_and_linear_above() -> None:
    target = torch.zeros(3, 4, 3, 3)
    predicted = torch.stack([torch.full((4, 3, 3), x) for x in (0.1, 0.5, -2.0)])
    # Twice x^2 / 2 below delta, twice delta (|x| - delta / 2) above.
    expected = torch.tensor([0.1**2, 2 * 0.2 * (0.5 - 0.1), 2 * 0.2 * (2 - 0.1)])
    torch.testing.assert_close(huber_per_example(predicted, target, delta=0.2), expected)
    torch.testing.assert_close(huber_per_example(predicted, target, delta=10.0), mse_per_example(predicted, target))


@pytest.mark.parametrize("levels", [DdpmLevels(build_scheduler().alphas_cumprod, "epsilon"), FlowLevels()])
def test_delta_falls_with_noise_as_the_formulas_say(levels: DdpmLevels | FlowLevels) -> None:
    timesteps = torch.tensor([0, 200, 999])
    found = huber_delta("exponential", 0.1, levels, timesteps)
    # exp(-alpha t) with alpha = -ln(0.1) / T.
    torch.testing.assert_close(found.double(), torch.exp(math.log(0.1) / 1000 * timesteps.double()), rtol=1e-5, atol=0)
    sigma = levels.snr(timesteps).double() ** -0.5
    expected = (1 - 0.1) / (1 + sigma) ** 2 + 0.1
    found = huber_delta("snr", 0.1, levels, timesteps)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)
    assert 1 > found[0] > found[1] > found[2] >= 0.1


def test_each_example_has_its_own_delta() -> None:
    draw = torch.Generator().manual_seed(0)
    predicted, target = torch.randn(2, 3, 4, 3, 5, generator=draw)
    deltas = torch.tensor([0.1, 0.7, 9.0])
    expected = [
        huber_per_example(p[None], t[None], delta=float(d)) for p, t, d in zip(predicted, target, deltas, strict=True)
    ]
    torch.testing.assert_close(huber_per_example(predicted, target, delta=deltas), torch.cat(expected))


def test_weighted_loss_is_a_weighted_mean() -> None:
    draw = torch.Generator().manual_seed(0)
    predicted, target = torch.randn(2, 2, 4, 3, 5, generator=draw).double()
    weights = torch.rand(2, 1, 3, 5, generator=draw).double()
    weights[0, :, :, :2] = 0.0
    errors, spread = (predicted - target).pow(2), weights.expand(2, 4, 3, 5)
    expected = (errors * spread).sum(dim=(1, 2, 3)) / spread.sum(dim=(1, 2, 3))
    torch.testing.assert_close(mean_per_example(errors, weights), expected)
    torch.testing.assert_close(mse_per_example(predicted, target, weights), expected.float())
    huber = huber_per_example(predicted, target, weights, delta=0.3)
    size = (predicted - target).abs()
    element = torch.where(size < 0.3, size.pow(2), 2 * 0.3 * (size - 0.15))
    torch.testing.assert_close(huber, ((element * spread).sum(dim=(1, 2, 3)) / spread.sum(dim=(1, 2, 3))).float())
    # What is hidden entirely does not count, and how much is hidden does not weaken the rest.
    hidden = predicted.clone()
    hidden[0, :, :, :2] += 100
    torch.testing.assert_close(mse_per_example(hidden, target, weights), expected.float())
    torch.testing.assert_close(mse_per_example(predicted, target, 0.3 * weights), expected.float())


# As each paper gives it for epsilon prediction.
FORMULAS: dict[str, Callable[[torch.Tensor, float], torch.Tensor]] = {
    "constant": lambda snr, _: torch.ones_like(snr),
    "min_snr": lambda snr, gamma: torch.minimum(snr, torch.full_like(snr, gamma)) / snr,
    "soft_min_snr": lambda snr, gamma: gamma / (snr + gamma),
    "p2": lambda snr, gamma: 1 / (1 + snr) ** gamma,
    "debiased": lambda snr, _: 1 / snr.sqrt(),
}


def weights(name: str, alphas_cumprod: Tensor, kind: PredictionType, gamma: float | None = None) -> Tensor:
    """The weight at every timestep of a schedule."""
    return loss_weight(name, DdpmLevels(alphas_cumprod, kind), torch.arange(len(alphas_cumprod)), gamma)


@pytest.mark.parametrize("name", list(FORMULAS))
@pytest.mark.parametrize("gamma", [None, 0.5, 3.0])
def test_weights_equal_the_papers_formulas(name: str, gamma: float | None) -> None:
    alphas_cumprod = build_scheduler().alphas_cumprod.double()
    snr = alphas_cumprod / (1 - alphas_cumprod)
    usual = {"p2": 1.0}.get(name, 5.0)
    expected = FORMULAS[name](snr, usual if gamma is None else gamma)
    found = weights(name, alphas_cumprod, "epsilon", gamma)
    torch.testing.assert_close(found.double(), expected)
    if name != "constant":
        # The same objective on the clean latents: v's error is (SNR + 1) / SNR times epsilon's.
        torch.testing.assert_close(weights(name, alphas_cumprod, "v_prediction", gamma), expected * snr / (snr + 1))


def test_min_snr_for_v_equals_the_papers_formula() -> None:
    snr = torch.tensor([0.1, 4.0, 50.0], dtype=torch.float64)
    expected = torch.tensor([0.1, 4.0, 5.0], dtype=torch.float64) / (snr + 1)
    torch.testing.assert_close(weights("min_snr", snr / (1 + snr), "v_prediction"), expected)


def test_weights_have_known_values_on_the_schedule() -> None:
    alphas_cumprod = build_scheduler().alphas_cumprod.double()
    found = weights("min_snr", alphas_cumprod, "epsilon")
    assert found.mean().item() == pytest.approx(0.917, abs=5e-4)
    assert (found < 1).nonzero().max() == 146
    share = weights("debiased", alphas_cumprod, "epsilon")
    assert (share[800:].sum() / share.sum()).item() == pytest.approx(0.585, abs=2e-3)
    # With gamma 1 the smooth minimum is P2(1, 1).
    torch.testing.assert_close(
        weights("soft_min_snr", alphas_cumprod, "epsilon", 1.0), weights("p2", alphas_cumprod, "epsilon")
    )


def test_weights_of_pure_noise_are_finite_for_v() -> None:
    zero = torch.zeros(1)
    for name in FORMULAS:
        assert torch.isfinite(weights(name, zero, "v_prediction")).all()


def test_unknown_weighting_is_refused() -> None:
    with pytest.raises(KeyError):
        weights("minsnr", torch.ones(1) / 2, "epsilon")


@pytest.mark.parametrize("name", list(FORMULAS))
def test_weights_of_flow_matching_are_those_of_the_clean_latents_times_s_squared(name: str) -> None:
    timesteps = torch.arange(1000)
    s = level(timesteps)
    snr = ((1 - s) / s) ** 2
    gamma = {"p2": 1.0}.get(name, 5.0)
    # The papers' formulas weigh epsilon's error, which is SNR times that of the clean latents.
    expected = torch.ones(1000) if name == "constant" else FORMULAS[name](snr, gamma) * snr * s**2
    expected = torch.where(s < 1, expected.double(), 1.0 if name == "constant" else 0.0)
    torch.testing.assert_close(loss_weight(name, FlowLevels(), timesteps).double(), expected, rtol=1e-5, atol=1e-7)
