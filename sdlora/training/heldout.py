"""The loss on pictures that are never trained on, at noise levels and noise that never change.

Floor 5. The same numbers are asked of every epoch, so that two epochs differ by what was learned and by nothing else.
"""

from __future__ import annotations

import torch

from sdlora import seeds
from sdlora.training.data import TrainingData
from sdlora.training.objective import Batch, diffusion_loss

NUM_LEVELS = 8


@torch.no_grad()
def heldout_loss(data: TrainingData, seed: int) -> float:
    """Mean squared error over all held-out pictures, at the middles of eight equal bands of timesteps, unweighted.

    Args:
        data: The held-out pictures; their own captions are used as they are.
        seed: The run's seed, for the noise.

    Returns:
        The mean, at least 0.
    """
    base = data.cache.base
    levels = [int((band + 0.5) * 1000 / NUM_LEVELS) for band in range(NUM_LEVELS)]
    losses: list[torch.Tensor] = []
    for index in range(len(data.dataset.examples)):
        moments = data.moments(index).unsqueeze(0)
        mean = moments.chunk(2, dim=1)[0]
        noise = [seeds.normal(mean.shape[1:], seed, "heldout noise", data.name(index), level) for level in levels]
        text = data.text([(index, 1)] * NUM_LEVELS)
        latents = base.sample_latents(moments, torch.zeros_like(mean)).expand(NUM_LEVELS, -1, -1, -1)
        losses.append(diffusion_loss(base, Batch(latents, torch.stack(noise), torch.tensor(levels), text)))
    return float(torch.cat(losses).mean())
