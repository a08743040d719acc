"""The types of what a pipeline gives its network and takes from it: latents stay in float32 whatever it computes in.

Hooks of `BaseModel.pipeline`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


def cast_inputs(network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
    """The arguments of a network in its own type, for a hook before its forward pass."""
    dtype = next(network.parameters()).dtype

    def cast(value: Any) -> Any:
        if isinstance(value, dict):
            # Sizes in pixels stay exact: bfloat16 has no odd integers above 256.
            return {name: inner if name == "time_ids" else cast(inner) for name, inner in value.items()}
        # Noise levels, a number for each image, stay exact as well.
        return mapped(
            lambda tensor: tensor.to(dtype) if tensor.is_floating_point() and tensor.dim() > 1 else tensor, value
        )

    return tuple(cast(value) for value in args), {name: cast(value) for name, value in kwargs.items()}


def mapped(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """A function of a tensor, or of each tensor in a list; anything else as it is."""
    if isinstance(value, list):
        return [mapped(function, inner) for inner in value]
    return function(value) if isinstance(value, Tensor) else value
