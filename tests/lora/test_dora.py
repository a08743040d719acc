"""DoRA against the paper's equation in float64; against PEFT in `test_layers.py`."""

import torch
from torch import nn

from sdlora.lora.layers import DoraConv2d, DoraLinear


def test_dora_linear_matches_equation_5() -> None:
    layer = DoraLinear(nn.Linear(6, 5), 2, 3.0, generator=torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        layer.up.normal_(generator=torch.Generator().manual_seed(1))
        layer.magnitude.mul_(1.5)
        x = torch.randn(7, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        directed = layer.base.weight + 1.5 * layer.up @ layer.down
        weight = layer.magnitude[:, None] * directed / directed.pow(2).sum(1, keepdim=True).sqrt()
        torch.testing.assert_close(layer(x), x @ weight.T + layer.base.bias)


def test_dora_convolution_matches_equation_5() -> None:
    generator = torch.Generator().manual_seed(0)
    layer = DoraConv2d(nn.Conv2d(4, 5, 3, padding=1), 2, 3.0, generator=generator).double()
    with torch.no_grad():
        layer.up.normal_(generator=generator)
        layer.magnitude.mul_(1.5)
        x = torch.randn(2, 4, 6, 7, generator=generator, dtype=torch.float64)
        directed = layer.base.weight + 1.5 * torch.einsum("or,rikl->oikl", layer.up.flatten(1), layer.down)
        norm = directed.pow(2).sum(dim=(1, 2, 3), keepdim=True).sqrt()
        weight = layer.magnitude.view(5, 1, 1, 1) * directed / norm
        torch.testing.assert_close(layer(x), nn.functional.conv2d(x, weight, layer.base.bias, padding=1))


def test_dora_starts_at_the_norm_of_the_base() -> None:
    base = nn.Linear(6, 5)
    layer = DoraLinear(base, 2, 3.0)
    torch.testing.assert_close(layer.magnitude.detach(), base.weight.norm(dim=1))
