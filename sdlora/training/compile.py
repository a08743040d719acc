"""A UNet's transformer blocks compiled by torch: once for all blocks and inputs of a kind.

Where no gradients are computed (previews, validation losses, what is preserved) the blocks are as they were.
What is trained is the same to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn

from sdlora.errors import ConfigError

MAX_KINDS = 256
"""So many kinds of block and input are compiled (torch allows no more); any other is computed without."""


def compile_blocks(unet: nn.Module) -> None:
    """Compile a UNet's transformer blocks, each kind at its first use.

    Args:
        unet: Changed in place, after `sdlora.training.recompute.keep_little`; `leave_blocks` takes it back.

    Raises:
        ConfigError: torch finds no compiler that works here.
    """
    torch.compiler.reset()  # what earlier runs of this process compiled would count against the limit
    _check_compiler(next(unet.parameters()).device)
    # A function of the block, not a method of one: so that the blocks share what is compiled.
    compiled = torch.compile(  # type: ignore[call-overload]
        BasicTransformerBlock.forward, fullgraph=True, dynamic=False, recompile_limit=MAX_KINDS
    )
    for block in _blocks(unet):
        block.forward = partial(_forward, block, compiled)
        for module in block.modules():
            if isinstance(module, GEGLU):
                # The compiler keeps as little by itself, and would compile each block anew for its own object here.
                vars(module).pop("forward", None)


def leave_blocks(unet: nn.Module) -> None:
    """Compute the blocks without compiling, as a base that is kept from run to run may not have been left."""
    for block in _blocks(unet):
        vars(block).pop("forward", None)


@contextmanager
def told_plainly() -> Iterator[None]:
    """Turn the compiler's failures inside the block into what to do about them.

    Raises:
        ConfigError: A block could not be compiled.
    """
    from torch._dynamo.exc import TorchDynamoException  # takes a second, and only runs that compile need it

    try:
        yield
    except TorchDynamoException as error:
        raise ConfigError(
            f"torch could not compile a block of the UNet: {_first_line(error)}. Leave train.compile at false, which "
            "trains the same; a run that was begun goes on with --resume --set train.compile=false."
        ) from error


def _forward(block: BasicTransformerBlock, compiled: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    if torch.is_grad_enabled():
        from torch._dynamo.exc import FailOnRecompileLimitHit

        try:
            return compiled(block, *args, **kwargs)
        except FailOnRecompileLimitHit:
            pass
    plain: Tensor = BasicTransformerBlock.forward(block, *args, **kwargs)
    return plain


def _blocks(unet: nn.Module) -> list[BasicTransformerBlock]:
    return [module for module in unet.modules() if isinstance(module, BasicTransformerBlock)]


def _check_compiler(device: torch.device) -> None:
    try:
        torch.compile(_probe, dynamic=False)(torch.ones(8, device=device))
    except RuntimeError as error:
        tool = "Triton and a C compiler" if device.type == "cuda" else "a C++ compiler such as g++"
        raise ConfigError(
            f"train.compile needs {tool}, and torch could compile nothing here: {_first_line(error)}. Install "
            "what is missing, or leave train.compile at false: the result is the same."
        ) from error


def _probe(x: Tensor) -> Tensor:
    return x * 2 + 1


def _first_line(error: Exception) -> str:
    cause = getattr(error, "inner_exception", error)
    return str(cause).strip().partition("\n")[0].rstrip(".:")
