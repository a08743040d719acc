"""The forward process and what the network is asked to predict.

Shapes: B batch, C channels, h/w latents, T noise levels (1000).
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from sdlora.errors import BaseModelError

PredictionType = Literal["epsilon", "v_prediction"]


def add_noise(latents: Tensor, noise: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """Move latents along the forward process to their noise levels.

    Args:
        latents: Clean latents, (B, C, h, w).
        noise: Standard normal noise, (B, C, h, w).
        alphas_cumprod: The schedule's cumulative product at each example's timestep, (B,), in (0, 1].

    Returns:
        sqrt(alphas_cumprod) * latents + sqrt(1 - alphas_cumprod) * noise, (B, C, h, w).

    Source: Ho et al. 2006.11239, equation 4.
    """
    alpha = alphas_cumprod.view(-1, 1, 1, 1)
    return alpha.sqrt() * latents + (1 - alpha).sqrt() * noise


def zero_terminal_snr(alphas_cumprod: Tensor) -> Tensor:
    """Rescale a schedule so that its last noise level holds no signal.

    Args:
        alphas_cumprod: The schedule, (T,), falling, in (0, 1).

    Returns:
        (T,): sqrt(alphas_cumprod) shifted so that it ends in 0 and scaled so that it begins as before, squared.

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
    """What the network should answer: the noise for "epsilon", the velocity for "v_prediction"; (B, C, h, w)."""
    if prediction_type == "epsilon":
        return noise
    return velocity(latents, noise, alphas_cumprod)


def predicted_latents(prediction_type: PredictionType, noisy: Tensor, answer: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """The clean latents that the network's answer amounts to, in one step.

    Args:
        prediction_type: What the network answers.
        noisy: What it was asked at, (B, C, h, w).
        answer: Its answer, (B, C, h, w).
        alphas_cumprod: At each example's timestep, (B,), in (0, 1] for epsilon and [0, 1] for v.

    Returns:
        (B, C, h, w).

    Source: Ho et al. 2006.11239, equation 15; for v, Salimans & Ho 2202.00512, section 4.
    """
    alpha = alphas_cumprod.view(-1, 1, 1, 1)
    if prediction_type == "epsilon":
        return (noisy - (1 - alpha).sqrt() * answer) / alpha.sqrt()
    return alpha.sqrt() * noisy - (1 - alpha).sqrt() * answer


def check_prediction_type(name: str) -> PredictionType:
    """Accept a scheduler's prediction type, or refuse it by name.

    Raises:
        BaseModelError: It is neither "epsilon" nor "v_prediction".
    """
    if name == "epsilon":
        return "epsilon"
    if name == "v_prediction":
        return "v_prediction"
    raise BaseModelError(
        f"The base's scheduler predicts {name!r}. sdlora trains 'epsilon' and 'v_prediction' models: "
        "choose such a base, or correct prediction_type in its scheduler_config.json."
    )
