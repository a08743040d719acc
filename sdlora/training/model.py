"""A base model's UNet and its adapter, set up so that a training step computes and keeps no more than it must.

Made before the optimizer, which trains its parameters; without gradients (previews, validation, prior predictions) it
computes as before. Torch may compile the transformer blocks, once for all blocks and inputs of a kind, with the result
of the plain model up to rounding. Frozen operations keep nothing for the backward pass that is cheap to recompute, with
the same results bit for bit: torch keeps the inputs of frozen convolutions (which only a weight's gradient needs), the
tensor between a normalisation and its activation, and all three factors of a gated activation.
Shapes: B batch, C channels, H/W pixels of the feature map, T tokens, d width.

Source: Bondarenko & Bibi 2404.12406, section 3, on convolutions; Chen et al. 1604.06174 on recomputation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.autograd import Function

from sdlora.errors import ConfigError
from sdlora.lora.flat_params import FlatWeights
from sdlora.lora.inject import Adapter
from sdlora.lora.layers import use_training_attention
from sdlora.models.lean_transformer import keep_little_of_transformer
from sdlora.training.optimizers import Group

MAX_KINDS = 256
"""At most this many kinds of block and input are compiled, torch's limit; others run uncompiled."""

# Adafactor keeps a mean per row and column, Muon orthogonalises: matrices must stay matrices, as for unknown ones.
_NEEDS_MATRICES = ("adafactor", "muon")
_aten = torch.ops.aten


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
        keep_little_of_transformer(unet, gradient_checkpointing=gradient_checkpointing)
        use_training_attention(unet)
        # A base model that is kept from run to run comes as the last run left it.
        if gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        else:
            unet.disable_gradient_checkpointing()
        for block in _blocks(unet):
            vars(block).pop("forward", None)  # undoes `compile_blocks`
        if compiled:
            if not _blocks(unet):
                raise ConfigError("train.compile is for base models with a UNet. Set it to false.")
            compile_blocks(unet)
        self._compiled = compiled
        self._adapter = adapter
        self._flat: FlatWeights | None = None
        self.groups = list(groups)
        if optimizer not in _NEEDS_MATRICES and ":" not in optimizer:
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


def keep_little(unet: UNet2DConditionModel) -> None:
    """Make a frozen UNet keep less for the backward pass; without gradients it computes as before.

    It is changed in place except for adapters; its parameters keep their names.
    """
    for module in unet.modules():
        if isinstance(module, ResnetBlock2D) and _is_plain(module):
            module.forward = partial(_resnet, module)
        elif isinstance(module, GEGLU):
            module.forward = partial(_geglu, module)
        elif type(module) is nn.Conv2d and module.padding_mode == "zeros":
            module.forward = partial(_conv, module)  # type: ignore[method-assign]
    norm, activation = (getattr(unet, name, None) for name in ("conv_norm_out", "conv_act"))
    if isinstance(norm, nn.GroupNorm) and isinstance(activation, nn.SiLU):
        # No other module uses this activation, so it can be skipped once the norm has applied it.
        norm.forward = partial(_norm_silu, norm)  # type: ignore[method-assign]
        activation.forward = lambda x: x  # type: ignore[assignment, method-assign]


def _is_plain(block: ResnetBlock2D) -> bool:
    """Whether a block is of the kind in Stable Diffusion's UNets."""
    return (
        isinstance(block.nonlinearity, nn.SiLU)
        and block.time_embedding_norm == "default"
        and not block.skip_time_act
        and block.upsample is None
        and block.downsample is None
    )


def _resnet(block: ResnetBlock2D, x: Tensor, temb: Tensor | None, *_: Any, **__: Any) -> Tensor:
    """x + conv2(SiLU(norm2(conv1(SiLU(norm1(x))) + time))), as diffusers computes it."""
    hidden: Tensor = block.conv1(_norm_silu(block.norm1, x))
    if temb is not None and block.time_emb_proj is not None:
        hidden = hidden + block.time_emb_proj(block.nonlinearity(temb))[:, :, None, None]
    hidden = block.conv2(block.dropout(_norm_silu(block.norm2, hidden)))
    if block.conv_shortcut is not None:
        x = block.conv_shortcut(x)
    total = x + hidden
    return total if block.output_scale_factor == 1.0 else total / block.output_scale_factor


def _norm_silu(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    if not (torch.is_grad_enabled() and x.requires_grad):
        return F.silu(nn.GroupNorm.forward(norm, x))
    output: Tensor = _NormSilu.apply(  # type: ignore[no-untyped-call]
        x.contiguous(), norm.weight, norm.bias, norm.num_groups, norm.eps
    )
    return output


def _geglu(module: GEGLU, x: Tensor, *_: Any, **__: Any) -> Tensor:
    projected = module.proj(x)
    if torch.is_grad_enabled() and projected.requires_grad:
        output: Tensor = _Geglu.apply(projected)  # type: ignore[no-untyped-call]
        return output
    hidden, gate = projected.chunk(2, dim=-1)
    plain: Tensor = hidden * F.gelu(gate)
    return plain


def _conv(module: nn.Conv2d, x: Tensor) -> Tensor:
    frozen = not module.weight.requires_grad and (module.bias is None or not module.bias.requires_grad)
    if not (frozen and torch.is_grad_enabled() and x.requires_grad):
        return nn.Conv2d.forward(module, x)
    how = (module.stride, module.padding, module.dilation, module.groups)
    output: Tensor = _FrozenConv.apply(x, module.weight, module.bias, how)  # type: ignore[no-untyped-call]
    return output


class _FrozenConv(Function):
    """A convolution (B, C, H, W) that keeps its weight and the shape of its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, how: tuple[Any, ...]) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.shape, ctx.how = x.shape, how
        return F.conv2d(x, weight, bias, *how)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.how
        # Without a gradient of the weight, only the input's shape is used.
        shape = grad.new_empty(1).expand(ctx.shape)
        mask = [True, False, False]
        found = _aten.convolution_backward(
            grad, shape, weight, None, stride, padding, dilation, False, [0, 0], groups, mask
        )
        return found[0], None, None, None


class _NormSilu(Function):
    """SiLU(GroupNorm(x)), (B, C, H, W), that keeps x and the groups' statistics."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float) -> Tensor:
        ctx.how = (x.shape[0], x.shape[1], x[0, 0].numel(), num_groups)
        y, mean, rstd = _aten.native_group_norm(x, weight, bias, *ctx.how, eps)
        ctx.eps = eps
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        return F.silu(y, inplace=True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        y = _aten.native_group_norm(x, weight, bias, *ctx.how, ctx.eps)[0]
        grad = _aten.silu_backward(grad, y)
        del y
        mask = [True, False, False]
        found = _aten.native_group_norm_backward(grad.contiguous(), x, mean, rstd, weight, *ctx.how, mask)
        return found[0], None, None, None, None


class _Geglu(Function):
    """hidden * GELU(gate) of their concatenation (B, T, 2d), the only tensor that it keeps.

    Source: Shazeer 2002.05202, equation 6.
    """

    @staticmethod
    def forward(ctx: Any, projected: Tensor) -> Tensor:
        ctx.save_for_backward(projected)
        hidden, gate = projected.chunk(2, dim=-1)
        return F.gelu(gate).mul_(hidden)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (projected,) = ctx.saved_tensors
        hidden, gate = projected.chunk(2, dim=-1)
        both = torch.empty_like(projected)
        grad_hidden, grad_gate = both.chunk(2, dim=-1)
        torch.mul(grad, F.gelu(gate), out=grad_hidden)
        _aten.gelu_backward.grad_input(grad * hidden, gate, approximate="none", grad_input=grad_gate)
        return both
