"""A step that computes and keeps no more than it must, made of a base and its adapter.

What is trained is the same to rounding.
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
from sdlora.training.compile import compile_blocks, leave_blocks, told_plainly
from sdlora.training.optimizers import Group
from sdlora.training.recompute import keep_little

# Adafactor's second moments are a matrix's rows and columns, so that matrices must stay matrices.
_BY_MATRIX = ("adafactor",)


class LeanStep:
    """Prepares a UNet and its adapter for training, in place.

    Args:
        unet: With the adapter in it.
        adapter: What is trained.
        groups: Its parameters, by learning rate.
        optimizer: The optimizer's name, for some need matrices.
        gradient_checkpointing: Compute blocks again on the way back instead of keeping what is inside of them.
        compiled: Let torch compile the transformer blocks.

    Raises:
        ConfigError: It is to be compiled, and torch finds no compiler here.

    Attributes:
        groups: What the optimizer trains: a long tensor or two for each of the groups.
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
        # A base that is kept from run to run comes as the last one left it.
        if gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        else:
            unet.disable_gradient_checkpointing()
        leave_blocks(unet)
        if compiled:
            compile_blocks(unet)
        self._compiled = compiled
        self._flat: FlatWeights | None = None
        self.groups = list(groups)
        if optimizer not in _BY_MATRIX:
            self._flat = FlatWeights(adapter, [group.parameters for group in groups])
            self.groups = [
                replace(group, parameters=leaves) for group, leaves in zip(groups, self._flat.leaves, strict=True)
            ]
        self._adapter = adapter

    def parameters(self) -> list[nn.Parameter]:
        """Everything that is trained, as the optimizer sees it."""
        if self._flat is None:
            return list(self._adapter.parameters())
        return [parameter for group in self.groups for parameter in group.parameters]

    def by_layer(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Tensors shaped like `parameters`, as views shaped and ordered like the adapter's own."""
        return list(tensors) if self._flat is None else self._flat.parts(tensors)

    @contextmanager
    def live(self) -> Iterator[None]:
        """A forward pass and its backward pass."""
        with self._flat.live() if self._flat else nullcontext(), told_plainly() if self._compiled else nullcontext():
            yield
