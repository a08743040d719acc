"""The forward process of diffusion models, and what their networks are trained to predict.

The training loss calls it through a base model's noise levels; the copy check inverts predictions with them.
Shapes: B batch, C channels, h/w latents, T timesteps (1000).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, cast

import torch.nn.functional as F
from torch import Tensor

from sdlora.errors import BaseModelError

_LEVELS = 10
PredictionType = Literal["epsilon", "v_prediction"]


class NoiseLevels(Protocol):
    """What an integer timestep in [0, 999] means to a base model; latents are (B, C, h, w), all else (B,)."""

    def mix(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Clean latents with standard normal noise, at their timesteps."""

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the network is to predict."""

    def clean(self, noisy: Tensor, prediction: Tensor, timesteps: Tensor) -> Tensor:
        """The clean latents that a prediction implies in one step."""

    def snr(self, timesteps: Tensor) -> Tensor:
        """Signal-to-noise ratio, at least 0."""

    def error_factor(self, timesteps: Tensor) -> Tensor:
        """The squared error of a prediction over that of the clean latents it implies."""


@dataclass(frozen=True)
class DdpmLevels:
    """The noise levels of a DDPM schedule.

    Attributes:
        alphas_cumprod: Cumulative products, (1000,) float32, on the device of the timesteps it is asked for.
        prediction_type: What the network predicts.
    """

    alphas_cumprod: Tensor
    prediction_type: PredictionType

    def mix(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """See `add_noise`."""
        return add_noise(latents, noise, self.alphas_cumprod[timesteps])

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """See `prediction_target`."""
        return prediction_target(self.prediction_type, latents, noise, self.alphas_cumprod[timesteps])

    def clean(self, noisy: Tensor, prediction: Tensor, timesteps: Tensor) -> Tensor:
        """See `predicted_latents`."""
        return predicted_latents(self.prediction_type, noisy, prediction, self.alphas_cumprod[timesteps])

    def snr(self, timesteps: Tensor) -> Tensor:
        """alphas_cumprod / (1 - alphas_cumprod)."""
        alphas_cumprod = self.alphas_cumprod[timesteps]
        return alphas_cumprod / (1 - alphas_cumprod)

    def error_factor(self, timesteps: Tensor) -> Tensor:
        """SNR for epsilon, SNR + 1 for v (Salimans & Ho 2202.00512, appendix D)."""
        snr = self.snr(timesteps)
        return snr if self.prediction_type == "epsilon" else snr + 1


def add_noise(latents: Tensor, noise: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """Move clean latents along the forward process to their timesteps, with standard normal noise, all (B, C, h, w).

    `alphas_cumprod` is the schedule's cumulative product at each example's timestep, (B,), in (0, 1].

    Returns:
        sqrt(alphas_cumprod) * latents + sqrt(1 - alphas_cumprod) * noise, (B, C, h, w).

    Source: Ho et al. 2006.11239, equation 4.
    """
    alpha = alphas_cumprod.view(-1, 1, 1, 1)
    return alpha.sqrt() * latents + (1 - alpha).sqrt() * noise


def multires_noise(
    noise: Tensor, discount: float, draw: Callable[[int, int, int], Tensor], ratio: Callable[[int], float]
) -> Tensor:
    """Noise with more power at low frequencies: sum over i of discount^i times noise of 1/r_i^i the size, enlarged.

    Args:
        noise: Standard normal, (C, h, w), which has the first part.
        discount: In (0, 1).
        draw: (level, height, width) to standard normal noise of that size, (C, height, width).
        ratio: Level to a uniform number in [0, 1), which makes r_i = 2 + 2u.

    Returns:
        (C, h, w) of variance 1; the last level is the first that has a side of one pixel, or the tenth.

    Source: Whitaker 2023, "Multi-resolution noise for diffusion model training", with the loop of kohya's sd-scripts.
    """
    height, width = noise.shape[1:]
    total = noise.clone()
    for level in range(_LEVELS):
        shrunk = (2 + 2 * ratio(level)) ** level
        rows, columns = max(1, int(height / shrunk)), max(1, int(width / shrunk))
        part = draw(level, rows, columns)[None]
        total += F.interpolate(part, size=(height, width), mode="bilinear")[0] * discount**level
        if 1 in (rows, columns):
            break
    return total / total.std()


def zero_terminal_snr(alphas_cumprod: Tensor) -> Tensor:
    """Rescale a schedule, (T,), falling, in (0, 1), so that its last timestep has no signal.

    Returns:
        (T,): sqrt(alphas_cumprod) shifted to end at 0 and scaled to begin where it did, squared.

    Source: Lin et al. 2305.08891, algorithm 1.
    """
    root = alphas_cumprod.sqrt()
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])).pow(2)


def velocity(latents: Tensor, noise: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """The v target: sqrt(alphas_cumprod) * noise - sqrt(1 - alphas_cumprod) * latents, (B, C, h, w).

    Source: Salimans & Ho 2202.00512, section 4.
    """
    alpha = alphas_cumprod.view(-1, 1, 1, 1)
    return alpha.sqrt() * noise - (1 - alpha).sqrt() * latents


def prediction_target(
    prediction_type: PredictionType, latents: Tensor, noise: Tensor, alphas_cumprod: Tensor
) -> Tensor:
    """What the network is to predict: the noise for "epsilon", the velocity for "v_prediction"; (B, C, h, w)."""
    return noise if prediction_type == "epsilon" else velocity(latents, noise, alphas_cumprod)


def latents_from_noise(noisy: Tensor, noise: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """Clean latents by predicted noise; alphas_cumprod (B,) in (0, 1], all else (B, C, h, w).

    Source: Ho et al. 2006.11239, equation 15.
    """
    alpha = alphas_cumprod.view(-1, 1, 1, 1)
    return (noisy - (1 - alpha).sqrt() * noise) / alpha.sqrt()


def latents_from_velocity(noisy: Tensor, v: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """Clean latents by a predicted velocity; alphas_cumprod (B,) in [0, 1], all else (B, C, h, w).

    Source: Salimans & Ho 2202.00512, section 4.
    """
    alpha = alphas_cumprod.view(-1, 1, 1, 1)
    return alpha.sqrt() * noisy - (1 - alpha).sqrt() * v


def predicted_latents(
    prediction_type: PredictionType, noisy: Tensor, prediction: Tensor, alphas_cumprod: Tensor
) -> Tensor:
    """The clean latents that a network's prediction implies in one step, (B, C, h, w)."""
    invert = latents_from_noise if prediction_type == "epsilon" else latents_from_velocity
    return invert(noisy, prediction, alphas_cumprod)


def check_prediction_type(name: str) -> PredictionType:
    """Accept a scheduler's prediction type, or refuse it by name.

    Raises:
        BaseModelError: It is neither "epsilon" nor "v_prediction".
    """
    if name in ("epsilon", "v_prediction"):
        return cast(PredictionType, name)
    raise BaseModelError(
        f"The base model's scheduler has prediction_type {name!r}; sdlora trains 'epsilon' and 'v_prediction'. Choose "
        "such a base model, or correct prediction_type in its scheduler_config.json."
    )
