"""Randomness as a function of (seed, purpose, counters...): the same values always and everywhere.

Used for every random draw. No generator state is kept, so a resumed, a reordered and a distributed run draw the same
noise for the same exposure of the same example, and a preview cannot disturb training.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

Counter = int | str


def derive(seed: int, purpose: str, *counters: Counter) -> int:
    """Hash a seed, a purpose and counters to one integer.

    Args:
        seed: The run's, any integer.
        purpose: What is drawn ("noise", "timestep", ...); different purposes are independent.
        counters: They identify the draw, such as (example name, exposure).

    Returns:
        An integer in [0, 2**63), the BLAKE2b digest of the arguments.
    """
    text = "\x1f".join([str(seed), purpose, *(f"{type(c).__name__}:{c}" for c in counters)])
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(seed: int, purpose: str, *counters: Counter) -> torch.Generator:
    """A CPU generator at the start of the stream that `derive` names."""
    return torch.Generator(device="cpu").manual_seed(derive(seed, purpose, *counters))


def uniform(seed: int, purpose: str, *counters: Counter) -> float:
    """One float64, uniform in [0, 1)."""
    # 53 bits fill a float64's mantissa exactly, so 1.0 is never reached.
    return (derive(seed, purpose, *counters) >> 10) / (1 << 53)


def normal(shape: Sequence[int], seed: int, purpose: str, *counters: Counter) -> torch.Tensor:
    """Standard normal values of the given shape, float32 on the CPU."""
    return torch.randn(tuple(shape), generator=generator(seed, purpose, *counters), dtype=torch.float32)


def permutation(count: int, seed: int, purpose: str, *counters: Counter) -> list[int]:
    """A random permutation of 0 .. count - 1."""
    order: list[int] = torch.randperm(count, generator=generator(seed, purpose, *counters)).tolist()
    return order
