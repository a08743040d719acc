"""A base model's UNet and its adapter, set up so that a training step computes and keeps no more than it must.

Made before the optimizer, which trains its parameters. The result is that of the plain model, up to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace

from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from sdlora.lora.attention import use_training_attention
from sdlora.lora.flat_params import FlatWeights
from sdlora.lora.inject import Adapter
from sdlora.training.compile import compile_blocks, explained_compiler_errors, uncompile_blocks
from sdlora.training.optimizers import Group
from sdlora.training.recompute import keep_little

# Adafactor keeps a mean per row and column of a matrix, so matrices must stay matrices.
_NEEDS_MATRICES = ("adafactor",)


class TrainingModel:
    """Prepares a UNet and its adapter for training, in place.

    Args:
        unet: With the adapter in it.
        adapter: The parameters that are trained.
        groups: Its parameters, by learning rate.
        optimizer: The optimizer's name, since some need matrices.
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
        uncompile_blocks(unet)
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
