"""What `train.compile` makes of the transformer blocks: `python tests/benchmarks/compiled.py [--time 15]`.

Counts, by torch's own report, the graphs that a block falls into and those that a whole UNet's blocks are compiled to,
and compares gradients and kept bytes with the step that is not compiled; with --time also seconds per step, in turns.
The compiler is inductor, which needs g++ here. Shapes: B batch, C latent channels, h/w latents, T tokens, d width.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from counts import saved_for_backward
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor
from torch._dynamo.utils import counters

from sdlora.lora.inject import find_targets, inject
from sdlora.training.model import TrainingModel
from sdlora.training.optimizers import Group


class Side:
    """A UNet of random weights with an adapter at rank 8, compiled or not."""

    def __init__(self, width: int, dtype: torch.dtype, *, compiled: bool) -> None:
        torch.manual_seed(0)
        self.unet = UNet2DConditionModel(
            sample_size=32, block_out_channels=(width, 2 * width), layers_per_block=1, norm_num_groups=16,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), attention_head_dim=8, cross_attention_dim=768,
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        ).eval().to(dtype)  # fmt: skip
        adapter = inject(self.unet, find_targets(self.unet, ["self_attention", "cross_attention"]), 8, 8.0, 0)
        with torch.no_grad():
            for up in adapter.up_parameters():
                up.normal_(std=0.02)
        groups = [Group(adapter.parameters(), 1.0)]
        self.step = TrainingModel(
            self.unet, adapter, groups, optimizer="adamw", gradient_checkpointing=False, compiled=compiled
        )
        self.given = (torch.randn(1, 4, 32, 32).to(dtype), torch.tensor([500]), torch.randn(1, 77, 768).to(dtype))

    def loss(self) -> Tensor:
        answer: Tensor = self.unet(*self.given).sample
        return answer.float().pow(2).mean()

    def gradient(self) -> Tensor:
        for parameter in self.step.parameters():
            parameter.grad = None
        with self.step.forward_backward():
            self.loss().backward()  # type: ignore[no-untyped-call]
        return torch.cat([p.grad.flatten() for p in self.step.parameters() if p.grad is not None])

    def kept_bytes(self) -> int:
        with self.step.forward_backward(), saved_for_backward(self.unet) as saved:
            loss = self.loss()
        del loss
        return saved.held_bytes

    def blocks(self) -> list[BasicTransformerBlock]:
        return [module for module in self.unet.modules() if isinstance(module, BasicTransformerBlock)]

    def graphs_of_a_block(self) -> tuple[int, int]:
        """Graphs and breaks of the second block by torch's report."""
        block = self.blocks()[1]
        x = torch.randn(1, 32 * 32, block.dim, dtype=self.unet.dtype, requires_grad=True)
        with self.step.forward_backward():
            told = torch._dynamo.explain(BasicTransformerBlock.forward)(block, x, encoder_hidden_states=self.given[2])
        return told.graph_count, told.graph_break_count


def main() -> None:
    """Print what torch says of a block, of a UNet's blocks, and what a step is like."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=160)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--time", type=int, default=0, metavar="TURNS")
    wish = parser.parse_args()
    dtype = getattr(torch, wish.dtype)
    plain, own = Side(wish.width, dtype, compiled=False), Side(wish.width, dtype, compiled=True)
    graphs, breaks = own.graphs_of_a_block()
    print(f"a transformer block: {graphs} graph, {breaks} breaks")
    torch._dynamo.reset()
    counters.clear()
    begin = time.perf_counter()
    found = own.gradient()
    first_seconds = time.perf_counter() - begin
    print(f"{len(own.blocks())} blocks of a UNet: compiled to {counters['stats']['unique_graphs']} graphs")
    expected = plain.gradient()
    print(f"gradient, relative error: {((found - expected).norm() / expected.norm()).item():.1e}")
    print(f"kept bytes of a step over those without: {own.kept_bytes() / plain.kept_bytes():.3f}")
    if wish.time:
        ratios, seconds = [], 0.0
        for turn in range(wish.time):
            taken = {}
            for side in (plain, own) if turn % 2 else (own, plain):
                begin = time.perf_counter()
                side.gradient()
                taken[side] = time.perf_counter() - begin
            ratios.append(taken[own] / taken[plain])
            seconds = taken[plain]
        print(
            f"seconds of a step over those without, median of {wish.time}: {statistics.median(ratios):.3f} "
            f"({min(ratios):.3f} to {max(ratios):.3f}); the first, which compiles: {first_seconds / seconds:.0f} steps"
        )


if __name__ == "__main__":
    main()
