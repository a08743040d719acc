"""What keeps an adapter from learning too much: ranks and layers that are left out at random, and a limit of its norm.

An `Adapter` drops while a training step computes; the step limits norms after the optimizer.
Shapes: B batch, r rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from sdlora.common import seeds
from sdlora.lora.layers import LoraLayer


@contextmanager
def dropping(layers: Mapping[str, LoraLayer], seed: int, exposures: Sequence[tuple[str, int]]) -> Iterator[None]:
    """Leave inputs, ranks and whole updates out inside the block; see `Adapter.dropping`."""
    dropped = {path: layer for path, layer in layers.items() if layer.drops}
    for path, layer in dropped.items():
        if layer.dropout > 0:
            layer.dropout_seeds = tuple(seeds.derive(seed, "dropout", path, *exposure) for exposure in exposures)
        if layer.rank_dropout > 0 or layer.module_dropout > 0:
            kept = torch.stack([kept_ranks(layer, seed, path, exposure) for exposure in exposures])
            layer.kept_ranks = kept.to(layer.down.device)
    try:
        yield
    finally:
        for layer in dropped.values():
            layer.dropout_seeds, layer.kept_ranks = (), None


def kept_ranks(layer: LoraLayer, seed: int, path: str, exposure: tuple[str, int]) -> Tensor:
    """Factors of a layer's ranks at an exposure, (r,): zero where they are left out, which all of them may be.

    Ranks that stay are divided by the share that does, a layer that stays is as it is.

    Source: kohya's sd-scripts (`rank_dropout`, `module_dropout`); for layers, Huang et al. 1603.09382.
    """
    drawn = torch.rand(layer.rank, generator=seeds.generator(seed, "rank dropout", path, *exposure))
    stays = seeds.uniform(seed, "module dropout", path, *exposure) >= layer.module_dropout
    return (drawn >= layer.rank_dropout).float() / (1 - layer.rank_dropout) * stays


@torch.no_grad()
def limit_norms(layers: Iterable[LoraLayer], largest: float) -> None:
    """Shrink A and B alike wherever the norm of a layer's update, ||s B A||, is above `largest`.

    Source: Srebro et al. 2005 on norms of products; kohya's sd-scripts (`scale_weight_norms`) has this form.
    """
    for layer in layers:
        down, up = layer.down.flatten(1), layer.up.flatten(1)
        # ||B A||^2 is the trace of B^T B A A^T, whose factors are r by r.
        norm = layer.scale * ((up.T @ up) * (down @ down.T)).sum().clamp(min=0).sqrt()
        factor = (largest / norm.clamp(min=1e-30)).clamp(max=1).sqrt()
        layer.down.mul_(factor)
        layer.up.mul_(factor)
