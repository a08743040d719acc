"""Flow matching: every formula against one written from the papers in float64, and against diffusers' scheduler."""

from __future__ import annotations

from math import exp, log

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from sdlora.diffusion.flow import FlowLevels, level, log_shift, resolution_shift
from sdlora.diffusion.timesteps import Density

LEVELS = FlowLevels()


@pytest.fixture
def drawn() -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(6, 4, 3, 5, generator=draw, dtype=torch.float64) for _ in range(2))
    return latents, noise, torch.tensor([0, 1, 250, 499, 998, 999])


def test_timesteps_are_the_grid_of_diffusers_scheduler() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000)
    torch.testing.assert_close(level(torch.arange(999, -1, -1)).float(), scheduler.sigmas[:1000])
    assert level(torch.tensor([0, 999])).tolist() == [0.001, 1.0]


def test_latents_and_noise_mix_as_in_diffusers(drawn: tuple[Tensor, Tensor, Tensor]) -> None:
    latents, noise, timesteps = drawn
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000)
    told = scheduler.timesteps[999 - timesteps]  # from 1000 down to 1
    expected = scheduler.scale_noise(latents, told, noise)
    torch.testing.assert_close(LEVELS.mix(latents, noise, timesteps), expected, rtol=1e-6, atol=1e-6)
    # Esser et al. 2403.03206, equation 13.
    s = ((timesteps + 1).double() / 1000).view(-1, 1, 1, 1)
    torch.testing.assert_close(LEVELS.mix(latents, noise, timesteps), (1 - s) * latents + s * noise, rtol=0, atol=0)


def test_velocity_is_the_derivative_of_the_line_and_leads_back(drawn: tuple[Tensor, Tensor, Tensor]) -> None:
    latents, noise, timesteps = drawn
    velocity = LEVELS.target(latents, noise, timesteps)
    step = LEVELS.mix(latents, noise, timesteps + 1) - LEVELS.mix(latents, noise, timesteps)
    torch.testing.assert_close(step * 1000, velocity, rtol=1e-9, atol=1e-9)
    noisy = LEVELS.mix(latents, noise, timesteps)
    torch.testing.assert_close(LEVELS.clean(noisy, velocity, timesteps), latents, rtol=1e-12, atol=1e-12)


def test_an_euler_step_of_diffusers_along_the_velocity_reaches_the_clean_latents(
    drawn: tuple[Tensor, Tensor, Tensor],
) -> None:
    latents, noise, _ = drawn
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000)
    scheduler.set_timesteps(1)
    velocity = LEVELS.target(latents, noise, torch.tensor([999] * 6))
    reached = scheduler.step(velocity, scheduler.timesteps[0], noise, return_dict=False)[0]
    torch.testing.assert_close(reached, latents, rtol=1e-6, atol=1e-6)


def test_errors_of_velocity_and_clean_latents_differ_by_s_squared(drawn: tuple[Tensor, Tensor, Tensor]) -> None:
    latents, noise, timesteps = drawn
    noisy = LEVELS.mix(latents, noise, timesteps)
    wrong = LEVELS.target(latents, noise, timesteps) + 0.25
    error = (LEVELS.clean(noisy, wrong, timesteps) - latents).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(error * LEVELS.error_factor(timesteps), torch.full((6,), 0.0625, dtype=torch.float64))


def test_signal_to_noise_ratio_is_that_of_the_mixture() -> None:
    timesteps = torch.tensor([0, 499, 999])
    expected = torch.tensor([(0.999 / 0.001) ** 2, 1.0, 0.0])
    torch.testing.assert_close(LEVELS.snr(timesteps), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("k", [1.0, 2.0, 3.0, exp(1.15)])
def test_a_shift_moves_logits(k: float) -> None:
    s = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    shifted = k * s / (1 + (k - 1) * s)
    torch.testing.assert_close(torch.logit(shifted), torch.logit(s) + log_shift(k))


def test_shifts_by_resolution_lie_on_the_line_of_flux() -> None:
    line = ((256, 0.5), (4096, 1.15))
    assert resolution_shift(256, *line) == 0.5
    assert resolution_shift(4096, *line) == pytest.approx(1.15)
    assert exp(resolution_shift(1024, *line)) == pytest.approx(1.88, abs=5e-3)  # 512 px


@pytest.mark.parametrize("k", [1.0, 3.0])
def test_shares_of_the_bands_under_a_shift(k: float) -> None:
    edges = Density("logit_normal", mean=log(k)).edges
    shares = [edges[upper] - edges[upper - 200] for upper in range(200, 1001, 200)]
    expected = {1.0: [0.083, 0.260, 0.315, 0.260, 0.083], 3.0: [0.006, 0.060, 0.178, 0.369, 0.387]}[k]
    assert shares == pytest.approx(expected, abs=1e-3)
