"""Whether torch.compile takes the lean step's blocks: `python tests/benchmarks/compiled.py`.

Counts, by torch's own report, the graphs that one block of each repeated kind falls into, and tries to compile it with
inductor (which needs a C++ compiler). Shapes: B batch, T tokens, d width.
"""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from sdlora.lora.inject import inject
from sdlora.lora.targets import find_targets
from sdlora.training.lean import LeanStep
from sdlora.training.optimizers import Group

CONFIG = {
    "sample_size": 16, "block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 48, "attention_head_dim": 4,
}  # fmt: skip


def main() -> None:
    """Print what torch says of each kind of block."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_config(CONFIG).eval()
    adapter = inject(unet, find_targets(unet, ["self_attention", "cross_attention"]), 4, 4.0, 0)
    groups = [Group(adapter.parameters(), 1.0)]
    step = LeanStep(unet, adapter, groups, optimizer="adamw", gradient_checkpointing=False)
    for kind in (BasicTransformerBlock, ResnetBlock2D):
        block, args, kwargs = _called(unet, step, kind)
        with step.live():
            told = torch._dynamo.explain(block)(*args, **kwargs)
        print(f"{kind.__name__}: {told.graph_count} graphs, {told.graph_break_count} breaks")
        for reason in sorted({str(reason.reason).splitlines()[0] for reason in told.break_reasons}):
            print(f"  {reason}")
        torch._dynamo.reset()
        try:
            with step.live():
                torch.compile(block.forward)(*args, **kwargs)
            print("  inductor compiles it")
        except Exception as error:
            print(f"  inductor: {str(error).strip().splitlines()[1]}")
        torch._dynamo.reset()


def _called(
    unet: UNet2DConditionModel, step: LeanStep, kind: type[nn.Module]
) -> tuple[nn.Module, tuple[object, ...], dict[str, object]]:
    """The second block of a kind, and what it is called with in a step."""
    block = [module for module in unet.modules() if type(module) is kind][1]
    found: list[tuple[tuple[object, ...], dict[str, object]]] = []
    handle = block.register_forward_pre_hook(lambda _, args, kwargs: found.append((args, kwargs)), with_kwargs=True)
    with step.live():
        unet(torch.randn(2, 4, 16, 16), torch.tensor([20, 900]), torch.randn(2, 77, 48))
    handle.remove()
    args, kwargs = found[0]
    fresh = tuple(
        x.detach().requires_grad_() if isinstance(x, torch.Tensor) and i == 0 else x for i, x in enumerate(args)
    )
    return block, fresh, kwargs


if __name__ == "__main__":
    main()
