"""The fused operation against the formula in float64, by torch's own derivatives."""

from __future__ import annotations

import pytest
import torch
from counts import saved_for_backward
from torch import Tensor

from sdlora.lora.fused import fused_lora


def tensors(num_layers: int, bias: bool) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return [
        draw(2, 5, 6).requires_grad_(),
        draw(num_layers * 4, 6),
        draw(num_layers * 4) if bias else None,
        draw(num_layers * 3, 6).requires_grad_(),
        draw(num_layers, 4, 3).requires_grad_(),
    ]


@pytest.mark.parametrize(("num_layers", "bias"), [(1, True), (1, False), (3, False), (3, True)])
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_output_and_gradients_equal_the_formula(num_layers: int, bias: bool, scale: float) -> None:
    x, weight, b, downs, ups = tensors(num_layers, bias)
    assert x is not None and weight is not None and downs is not None and ups is not None
    found = fused_lora(x, weight, b, downs, ups, scale)
    parts = []
    for j in range(num_layers):
        rows = slice(4 * j, 4 * j + 4)
        product = weight[rows] + scale * ups[j] @ downs[3 * j : 3 * j + 3]
        parts.append(x @ product.T + (0 if b is None else b[rows]))
    torch.testing.assert_close(found, torch.cat(parts, dim=-1))
    assert torch.autograd.gradcheck(lambda *given: fused_lora(given[0], weight, b, *given[1:], scale), (x, downs, ups))
    # A compiler is given another form of it.
    traced = torch.compile(fused_lora, backend="aot_eager", fullgraph=True, dynamic=False)(
        x, weight, b, downs, ups, scale
    )
    torch.testing.assert_close(traced, found)
    given = torch.linspace(-1.0, 1.0, found.numel(), dtype=found.dtype).view_as(found)
    expected = torch.autograd.grad(found, (x, downs, ups), given)
    torch.testing.assert_close(torch.autograd.grad(traced, (x, downs, ups), given), expected)


def test_only_the_input_is_kept_and_a_frozen_input_gets_no_gradient() -> None:
    x, weight, _, downs, ups = tensors(3, False)
    assert x is not None and weight is not None and downs is not None and ups is not None
    frozen = x.detach()
    holder = torch.nn.ParameterList([weight, downs, ups])
    with saved_for_backward(holder) as saved:
        found = fused_lora(frozen, weight, None, downs, ups, 1.0)
    assert saved.held_bytes <= frozen.nbytes + weight.nbytes + downs.nbytes + ups.nbytes
    found.sum().backward()
    assert frozen.grad is None
    assert downs.grad is not None
