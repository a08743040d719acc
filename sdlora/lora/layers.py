"""The low-rank adapter of a linear layer.

Floor 2. Shapes: n inputs (any leading dimensions), i in, o out, r rank.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LoraLinear(nn.Module):
    """A frozen linear layer W0 with a trained low-rank update: y = W0 x + (alpha / r) B A x.

    A is Gaussian and B zero, so that training starts exactly at the base. A and B are kept in float32 whatever the
    base computes in, since an update smaller than bfloat16's steps would otherwise be lost.

    Args:
        base: The layer to adapt; it is frozen and used as it is.
        rank: r, at least 1 and at most min(i, o) to be of use.
        alpha: Numerator of the scale, above 0.
        generator: Where A is drawn from: N(0, 1/r^2), on the CPU.

    Source: Hu et al. 2106.09685, equation 3; the deviation 1/r of A is PEFT's "gaussian".
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float, *, generator: torch.Generator) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.rank = rank
        self.alpha = float(alpha)
        self.enabled = True
        self.strength = 1.0
        device = base.weight.device
        down = torch.randn(rank, base.in_features, generator=generator, dtype=torch.float32) / rank
        self.down = nn.Parameter(down.to(device))
        self.up = nn.Parameter(torch.zeros(base.out_features, rank, dtype=torch.float32, device=device))

    @property
    def scale(self) -> float:
        """alpha / r."""
        return self.alpha / self.rank

    def forward(self, x: Tensor) -> Tensor:
        """(n..., i) to (n..., o), in the type of x."""
        result: Tensor = self.base(x)
        if not self.enabled:
            return result
        # In this order, and with the products rounded as in PEFT, so that a loaded file gives the same numbers.
        update = F.linear(F.linear(x, self.down.to(x.dtype)), self.up.to(x.dtype))
        return result + update * (self.scale * self.strength)
