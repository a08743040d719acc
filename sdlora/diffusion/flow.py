"""Flow matching: latents and noise on a straight line, and the velocity along it.

A level s in (0, 1] is the share of noise, s = 1 being pure noise. Integer timesteps t in [0, 999] stand for
s = (t + 1) / 1000, the grid of diffusers' FlowMatchEulerDiscreteScheduler, so that schedules of exposures, coverage and
bands are the same for every family.
Shapes: B batch, C channels, h/w latents.

Source: Lipman et al. 2210.02747; Liu et al. 2209.03003, equation 1; Esser et al. 2403.03206, sections 2 and 3.1.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log

from torch import Tensor

from sdlora.diffusion.timesteps import NUM_TIMESTEPS


@dataclass(frozen=True)
class FlowLevels:
    """The noise levels of flow matching."""

    def mix(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_s = (1 - s) x0 + s e (Esser et al. 2403.03206, equation 13)."""
        s = level(timesteps).to(latents.dtype).view(-1, 1, 1, 1)
        return (1 - s) * latents + s * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The velocity v = dx_s / ds = e - x0."""
        return noise - latents

    def clean(self, noisy: Tensor, prediction: Tensor, timesteps: Tensor) -> Tensor:
        """x0 = x_s - s v."""
        return noisy - level(timesteps).to(noisy.dtype).view(-1, 1, 1, 1) * prediction

    def snr(self, timesteps: Tensor) -> Tensor:
        """((1 - s) / s)^2, 0 at pure noise."""
        s = level(timesteps)
        return ((1 - s) / s).square().float()

    def error_factor(self, timesteps: Tensor) -> Tensor:
        """1 / s^2, since an error of v moves x0 by s times as much."""
        return level(timesteps).pow(-2).float()


def level(timesteps: Tensor) -> Tensor:
    """The share of noise s = (t + 1) / 1000 of integer timesteps, in [0.001, 1], float64."""
    return (timesteps + 1).double() / NUM_TIMESTEPS


def log_shift(k: float) -> float:
    """What a shift k > 0 of noise levels adds to their logits.

    s' = k s / (1 + (k - 1) s) is logit s' = logit s + ln k, so a logit-normal density is only moved by it.

    Source: Esser et al. 2403.03206, equation 23.
    """
    return log(k)


def resolution_shift(num_tokens: int, first: tuple[int, float], second: tuple[int, float]) -> float:
    """ln k on the straight line through two points (number of image tokens, ln k), as FLUX.1 and others shift.

    Source: Esser et al. 2403.03206, section 5.3.2, whose root law these lines stand in for.
    """
    (low, at_low), (high, at_high) = first, second
    return at_low + (at_high - at_low) * (num_tokens - low) / (high - low)
