"""The training loss of each example, and its weight at each timestep.

The trainer chooses them by `loss.kind` and `loss.weighting`.
Shapes: B batch, C channels, h/w latents.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from sdlora.diffusion.noise import NoiseLevels
from sdlora.diffusion.timesteps import NUM_TIMESTEPS


def mse_per_example(predicted: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean squared error of a prediction, (B, C, h, w) of any float dtype, over everything but the batch, (B,) float32.

    For the weights see `mean_per_example`.

    Source: Ho et al. 2006.11239, equation 14 (the simple loss).
    """
    return mean_per_example((predicted.float() - target.float()).pow(2), weights)


def mean_per_example(errors: Tensor, weights: Tensor | None) -> Tensor:
    """Weighted mean of errors (B, C, h, w) per example, sum(w e) / (C sum(w)), (B,).

    An image weighs the same however much of it is masked. The weight of each latent pixel, (B, 1, h, w), is at least 0,
    and not all are 0 in any example; None for equal weights.
    """
    if weights is None:
        return errors.flatten(1).mean(dim=1)
    weights = weights.to(errors)
    return (errors.mean(dim=1, keepdim=True) * weights).flatten(1).sum(dim=1) / weights.flatten(1).sum(dim=1)


def huber_per_example(
    predicted: Tensor, target: Tensor, weights: Tensor | None = None, *, delta: float | Tensor
) -> Tensor:
    """Huber loss, mean over everything but the batch, in float32.

    Twice the usual one, so that errors below `delta`, above which it is linear, count as in `mse_per_example`, whose
    shapes it has. Each example may have a delta of its own, (B,).

    Source: Huber 1964, equation 1.1 with k = delta.
    """
    if isinstance(delta, Tensor):
        size, limit = (predicted.float() - target.float()).abs(), delta.float().view(-1, 1, 1, 1)
        return mean_per_example(torch.where(size <= limit, size.square(), limit * (2 * size - limit)), weights)
    errors = F.huber_loss(predicted.float(), target.float(), reduction="none", delta=delta)
    return 2 * mean_per_example(errors, weights)


def huber_delta(schedule: str, delta: float, levels: NoiseLevels, timesteps: Tensor) -> Tensor:
    """The delta of each example's Huber loss at its timestep, (B,), which falls from 1 to `delta` as noise grows.

    Args:
        schedule: "exponential", delta^(t / T), or "snr", (1 - delta) / (1 + sigma)^2 + delta with the noise-to-signal
            ratio sigma = 1 / sqrt(SNR).
        delta: In (0, 1].
        levels: The base model's noise levels.
        timesteps: Each example's, (B,).

    Raises:
        KeyError: The schedule is unknown.

    Source: Khrapov et al. 2403.16728, section 4 (exponential); kohya's sd-scripts has both.
    """
    at = {
        "exponential": lambda: delta ** (timesteps.float() / NUM_TIMESTEPS),
        "snr": lambda: (1 - delta) / (1 + levels.snr(timesteps).float().rsqrt()).square() + delta,
    }
    found: Tensor = at[schedule]()
    return found


# Weight of the squared error of the clean latents, and its default gamma; weights for predictions follow from it.
_WEIGHTS: dict[str, tuple[Callable[[Tensor, float], Tensor], float]] = {
    # min(SNR, gamma): Hang et al. 2303.09556.
    "min_snr": (lambda snr, gamma: snr.clamp(max=gamma), 5.0),
    # SNR gamma / (SNR + gamma): Crowson et al. 2401.11605, a smooth minimum.
    "soft_min_snr": (lambda snr, gamma: snr * gamma / (snr + gamma), 5.0),
    # SNR / (1 + SNR)^gamma: Choi et al. 2204.00227 with k = 1, relative to the simple loss.
    "p2": (lambda snr, gamma: snr / (1 + snr).pow(gamma), 1.0),
    # sqrt(SNR): Yu et al. 2310.08442, whose weight on the epsilon loss is 1 / sqrt(SNR).
    "debiased": (lambda snr, _: snr.sqrt(), 1.0),
}


def loss_weight(weighting: str, levels: NoiseLevels, timesteps: Tensor, gamma: float | None = None) -> Tensor:
    """The weight of each example's loss at its timestep.

    The weights are those of the squared error of the clean latents, divided by how much larger the squared error of a
    prediction is.

    Args:
        weighting: "constant", "min_snr", "soft_min_snr", "p2" or "debiased".
        levels: The base model's noise levels.
        timesteps: Each example's, (B,).
        gamma: Parameter of min_snr and soft_min_snr (5 if None) and of p2 (1 if None), above 0.

    Returns:
        (B,), at least 0.

    Raises:
        KeyError: The weighting is unknown.
    """
    if weighting == "constant":
        return torch.ones(timesteps.shape, device=timesteps.device)
    weight, default_gamma = _WEIGHTS[weighting]
    return weight(levels.snr(timesteps), default_gamma if gamma is None else gamma) / levels.error_factor(timesteps)
