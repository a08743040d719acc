"""Initial A and B of an adapter's layers that do not start at zero.

`inject` puts them into fresh layers, which subtract their product from then on.
Shapes: i in, o out, r rank, k kernel.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from sdlora.errors import ConfigError

Init = Literal["gaussian", "orthogonal", "pissa"]
"""A random A and a zero B, or singular triplets whose product is then subtracted."""


def initial_factors(
    init: Init, weight: Tensor, rank: int, scale: float, *, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """A0 and B0, of the shapes of A and B, each scaled by the root of the singular values; float32 on the CPU.

    "orthogonal" takes the last r triplets of a random matrix of the layer's shape, so that ranks start small and
    orthogonal to each other. "pissa" takes the first r triplets of the layer's own weights, divided by the scale, so
    that s B0 A0 is their best approximation of rank r.

    Args:
        weight: W0, (o, i) or (o, i, k, k).
        rank: r, at most min(i k k, o).
        scale: s = alpha / r.
        generator: Source of the random matrix, N(0, 1/r^2).

    Raises:
        ConfigError: The layer has fewer than r triplets.

    Source: Soboleva et al. 2507.05964, section 3.2, with the deviation 1/r of its code; Meng et al. 2404.02948,
    equations 2 to 4.
    """
    matrix = weight.detach().float().cpu().flatten(1)
    if rank > min(matrix.shape):
        raise ConfigError(
            f"lora.init = {init!r} needs a rank of at most {min(matrix.shape)} on a layer of {matrix.shape[0]} "
            f"outputs and {matrix.shape[1]} inputs, found {rank}. Lower lora.rank or set lora.init = 'gaussian'."
        )
    if init == "orthogonal":
        matrix = torch.randn(matrix.shape, generator=generator) / rank
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    if init == "orthogonal":
        u, s, v = u[:, -rank:], s[-rank:], v[-rank:]
    else:
        u, s, v = u[:, :rank], s[:rank] / scale, v[:rank]
    down, up = s.sqrt()[:, None] * v, u * s.sqrt()
    return down.reshape(rank, *weight.shape[1:]), up.reshape(-1, rank, *(1 for _ in weight.shape[2:]))
