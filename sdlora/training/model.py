"""A base model's UNet and its adapter, set up so that a training step computes and keeps no more than it must.

Made before the optimizer, which trains its parameters. The result is that of the plain model, up to rounding. Torch may
compile the transformer blocks, once for all blocks and inputs of a kind; without gradients (previews, validation, prior
predictions) the blocks run as they were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn

from sdlora.errors import ConfigError
from sdlora.lora.flat_params import FlatWeights
from sdlora.lora.inject import Adapter
from sdlora.lora.layers import use_training_attention
from sdlora.training.optimizers import Group
from sdlora.training.recompute import keep_little

MAX_KINDS = 256
"""At most this many kinds of block and input are compiled, torch's limit; others run uncompiled."""

# Adafactor keeps a mean per row and column of a matrix, so matrices must stay matrices.
_NEEDS_MATRICES = ("adafactor",)


class TrainingModel:
    """Prepares a UNet and its adapter for training, in place.

    Args:
        unet: With the adapter in it.
        groups: The adapter's parameters, by learning rate.
        optimizer: Its name, since some need matrices.
        gradient_checkpointing: Recompute blocks in the backward pass instead of keeping their activations.
        compiled: Let torch compile the transformer blocks.

    Raises:
        ConfigError: `compiled` is set, and torch finds no compiler.

    Attributes:
        groups: The optimizer's groups: one or two long tensors for each of the given groups.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        adapter: Adapter,
        groups: Sequence[Group],
        *,
        optimizer: str,
        gradient_checkpointing: bool,
        compiled: bool = False,
    ) -> None:
        keep_little(unet)
        use_training_attention(unet)
        # A base model that is kept from run to run comes as the last run left it.
        if gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        else:
            unet.disable_gradient_checkpointing()
        for block in _blocks(unet):
            vars(block).pop("forward", None)  # undoes `compile_blocks`
        if compiled:
            compile_blocks(unet)
        self._compiled = compiled
        self._adapter = adapter
        self._flat: FlatWeights | None = None
        self.groups = list(groups)
        if optimizer not in _NEEDS_MATRICES:
            self._flat = FlatWeights(adapter, [group.parameters for group in groups])
            self.groups = [
                replace(group, parameters=leaves) for group, leaves in zip(groups, self._flat.leaves, strict=True)
            ]

    def parameters(self) -> list[nn.Parameter]:
        """All trained parameters, as the optimizer sees them."""
        if self._flat is None:
            return list(self._adapter.parameters())
        return [parameter for group in self.groups for parameter in group.parameters]

    def by_layer(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Tensors shaped like `parameters`, as views shaped and ordered like the adapter's own parameters."""
        return list(tensors) if self._flat is None else self._flat.parts(tensors)

    @contextmanager
    def forward_backward(self) -> Iterator[None]:
        """Run a forward pass and its backward pass inside this block."""
        flat = self._flat.live() if self._flat else nullcontext()
        with flat, explained_compiler_errors() if self._compiled else nullcontext():
            yield


def compile_blocks(unet: nn.Module) -> None:
    """Compile a UNet's transformer blocks, each kind at its first use, after `keep_little`.

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
        torch.compile(lambda x: x * 2 + 1, dynamic=False)(torch.ones(8, device=device))
    except RuntimeError as error:
        tool = "Triton and a C compiler" if device.type == "cuda" else "a C++ compiler such as g++"
        raise ConfigError(
            f"train.compile needs {tool}, and torch could not compile a test function: {_first_line(error)}. Install "
            "what is missing, or leave train.compile at false: the result is the same."
        ) from error


def _first_line(error: Exception) -> str:
    cause = getattr(error, "inner_exception", error)
    return str(cause).strip().partition("\n")[0].rstrip(".:")
