"""What an exposure costs: the error of the denoised answer, and the distance from the base where it is to be preserved.

Shapes: B batch, K of it preserved, C latent channels, h/w latents.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sdlora.diffusion.losses import mse_per_example
from sdlora.diffusion.noise import add_noise, prediction_target
from sdlora.lora.inject import Adapter
from sdlora.models.base import BaseModel, TextEmbeddings

Error = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(predicted, target, weights), (B, C, h, w) twice and (B, 1, h, w) or None, to a loss per example, (B,)."""


@dataclass(frozen=True)
class Batch:
    """What the network is asked at.

    Attributes:
        latents: Clean scaled latents, (B, C, h, w).
        noise: Standard normal noise, (B, C, h, w).
        timesteps: Integers in [0, 999], (B,).
        text: Text states, the batch first.
        weights: How much each place counts in the loss, (B, 1, h, w); None for all alike.
    """

    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    text: TextEmbeddings
    weights: Tensor | None = None


def diffusion_loss(base: BaseModel, batch: Batch, error: Error = mse_per_example) -> Tensor:
    """The simple loss of each example at its timestep.

    Args:
        base: The model, its adapter in whatever state it is.
        batch: On any device.
        error: How answer and target are compared.

    Returns:
        (B,) float32 on the base's device.

    Source: Ho et al. 2006.11239, equation 14; for v, Salimans & Ho 2202.00512, section 4.
    """
    noisy, timesteps, target = _prepared(base, batch)
    return error(base.predict(noisy, timesteps, _moved(base, batch.text)), target, batch.weights)


def diffusion_loss_with_prior(
    base: BaseModel,
    adapter: Adapter,
    batch: Batch,
    chosen: Tensor,
    class_text: TextEmbeddings,
    kept_text: TextEmbeddings,
    error: Error = mse_per_example,
) -> tuple[Tensor, Tensor]:
    """The simple loss, and how far the adapter moves the base's answers to other words on the same noisy latents.

    Both come from one pass over the batch and those chosen of it, which costs less than two passes.

    Args:
        base: The model with the adapter in it.
        adapter: Switched off for the answers that are to be kept.
        batch: On any device.
        chosen: Which examples the distance is asked of, (K,) distinct indices into the batch, K at least 1.
        class_text: Their text states of captions without the trigger, K first.
        kept_text: The same from the base's own text encoder, for the answers that are to be kept.
        error: How answer and target are compared; the distance from the base is always the mean square, and over
            all places alike.

    Returns:
        Float32 on the base's device: the loss as in `diffusion_loss`, (B,), and the distance, (K,).

    Source: the distance is the prior preservation of Ruiz et al. 2208.12242, equation 2, with the base's own
    prediction as the target instead of images drawn by it.
    """
    noisy, timesteps, target = _prepared(base, batch)
    chosen = _on_device(base, chosen)
    again, when = noisy[chosen], timesteps[chosen]
    text, class_text = _moved(base, batch.text), _moved(base, class_text)
    with torch.no_grad(), adapter.disabled():
        kept = base.predict(again, when, _moved(base, kept_text))
    both = {name: torch.cat([text[name], class_text[name]]) for name in text}
    answers = base.predict(torch.cat([noisy, again]), torch.cat([timesteps, when]), both)
    predicted, moved = answers[: len(noisy)], answers[len(noisy) :]
    return error(predicted, target, batch.weights), mse_per_example(moved, kept)


def _prepared(base: BaseModel, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy latents, timesteps and the target, on the base's device."""
    tensors = (batch.latents, batch.noise, batch.timesteps)
    latents, noise, timesteps = (_on_device(base, x) for x in tensors)
    alphas_cumprod = base.alphas_cumprod[timesteps]
    target = prediction_target(base.prediction_type, latents, noise, alphas_cumprod)
    return add_noise(latents, noise, alphas_cumprod), timesteps, target


def _moved(base: BaseModel, text: TextEmbeddings) -> TextEmbeddings:
    return {name: _on_device(base, value) for name, value in text.items()}


def _on_device(base: BaseModel, tensor: Tensor) -> Tensor:
    """A tensor on the base's device; a GPU fetches it by itself, from memory that stays where it is."""
    if base.device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(base.device, non_blocking=True)
