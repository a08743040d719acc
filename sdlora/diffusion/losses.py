"""The training loss per example.

Floor 2. Shapes: B batch, C channels, h/w latents.
"""

from __future__ import annotations

from torch import Tensor


def mse_per_example(predicted: Tensor, target: Tensor) -> Tensor:
    """Mean squared error over everything but the batch, in float32.

    Args:
        predicted: The network's answer, (B, C, h, w), any float type.
        target: What it should have been, (B, C, h, w).

    Returns:
        (B,) float32.

    Source: Ho et al. 2006.11239, equation 14 (the simple loss).
    """
    return (predicted.float() - target.float()).pow(2).flatten(1).mean(dim=1)
