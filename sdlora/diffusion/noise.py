"""The forward process, and what a network is trained to predict.

The training loss calls it with a base model's schedule; the copy check inverts predictions with it.
Shapes: B batch, C channels, h/w latents, T timesteps (1000).
"""

from __future__ import annotations

from typing import Literal, cast

from torch import Tensor

from sdlora.errors import BaseModelError

PredictionType = Literal["epsilon", "v_prediction"]


def add_noise(latents: Tensor, noise: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """Move clean latents along the forward process to their timesteps, with standard normal noise, all (B, C, h, w).

    `alphas_cumprod` is the schedule's cumulative product at each example's timestep, (B,), in (0, 1].

    Returns:
        sqrt(alphas_cumprod) * latents + sqrt(1 - alphas_cumprod) * noise, (B, C, h, w).

    Source: Ho et al. 2006.11239, equation 4.
    """
    alpha = alphas_cumprod.view(-1, 1, 1, 1)
    return alpha.sqrt() * latents + (1 - alpha).sqrt() * noise


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
