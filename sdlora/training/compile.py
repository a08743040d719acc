"""Compiles a UNet's transformer blocks with torch, once for all blocks and inputs of a kind.

Used by the training model. Without gradients (previews, validation, prior predictions) the blocks run as they were;
training results are the same up to rounding.
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
"""At most this many kinds of block and input are compiled, torch's limit; others run uncompiled."""


def compile_blocks(unet: nn.Module) -> None:
    """Compile a UNet's transformer blocks, each kind at its first use.

    Args:
        unet: Changed in place, after `sdlora.training.recompute.keep_little`; `uncompile_blocks` undoes it.

    Raises:
        ConfigError: torch finds no working compiler.
    """
    torch.compiler.reset()  # earlier runs of this process would count against the limit
    _check_compiler(next(unet.parameters()).device)
    # The class's function, not a block's bound method, so that all blocks share what is compiled.
    compiled = torch.compile(  # type: ignore[call-overload]
        BasicTransformerBlock.forward, fullgraph=True, dynamic=False, recompile_limit=MAX_KINDS
    )
    for block in _blocks(unet):
        block.forward = partial(_forward, block, compiled)
        for module in block.modules():
            if isinstance(module, GEGLU):
                # The compiler keeps as little by itself, and a patched object would make it compile every block again.
                vars(module).pop("forward", None)


def uncompile_blocks(unet: nn.Module) -> None:
    """Undo `compile_blocks`, as a base model kept from run to run may still be compiled."""
    for block in _blocks(unet):
        vars(block).pop("forward", None)


@contextmanager
def explained_compiler_errors() -> Iterator[None]:
    """Turn the compiler's errors inside the block into one that says what to do.

    Raises:
        ConfigError: A block could not be compiled.
    """
    from torch._dynamo.exc import TorchDynamoException  # takes a second, and only runs that compile need it

    try:
        yield
    except TorchDynamoException as error:
        raise ConfigError(
            f"torch could not compile a block of the UNet: {_first_line(error)}. Leave train.compile at false, which "
            "trains the same; to resume a run, add --resume --set train.compile=false."
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
            f"train.compile needs {tool}, and torch could not compile a test function: {_first_line(error)}. Install "
            "what is missing, or leave train.compile at false: the result is the same."
        ) from error


def _probe(x: Tensor) -> Tensor:
    return x * 2 + 1


def _first_line(error: Exception) -> str:
    cause = getattr(error, "inner_exception", error)
    return str(cause).strip().partition("\n")[0].rstrip(".:")
