"""What a training step costs: sdlora against PEFT and against the floor, a frozen pass with the way back to its input.

    python tests/benchmarks/step.py                  counts at the families' true shapes, without weights
    python tests/benchmarks/step.py --time           seconds as well, of a reduced UNet with random weights
    python tests/benchmarks/step.py --json

Kernels, operations and kept bytes are counted, on any machine alike; seconds are of this one, interleaved, as medians
with their ranges. Shapes: B batch, C latent channels, h/w latents, L tokens.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from counts import KernelCounter, saved_for_backward
from peft import LoraConfig
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from sdlora.common.families import Family
from sdlora.estimate.meta_model import Shapes, counted, empty_network, shapes_of_family
from sdlora.lora.inject import TARGETS, adaptable, find_targets, inject
from sdlora.models.families import FAMILIES
from sdlora.training.model import TrainingModel
from sdlora.training.optimizers import Group

ATTENTION = ("cross_attention", "self_attention", "attention")
TRUE_SIZES: list[tuple[Family, int]] = [("sd1", 512), ("sdxl", 1024), ("z-image", 512), ("flux2-klein-4b", 512)]
VARIANTS = ("floor", "peft bf16", "peft fp32 + autocast", "sdlora")
# Two cores run a step of these in a second or so. The UNet has Stable Diffusion 1.5's first widths, halved, in two
# blocks; the transformers have a few blocks of their families' widths, halved and more.
REDUCED: dict[Family, dict[str, Any]] = {
    "sd1": {
        "sample_size": 32,
        "block_out_channels": (160, 320),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 768,
        "attention_head_dim": 8,
    },
    "z-image": {"dim": 1024, "n_heads": 8, "n_kv_heads": 8, "n_layers": 6, "n_refiner_layers": 1},
    "flux2-klein-4b": {"num_layers": 2, "num_single_layers": 6, "num_attention_heads": 8},
}


@dataclass(frozen=True)
class Counts:
    """Of one step, forward and backward."""

    kernels: int
    gflop: float
    saved_mib: float
    weights_mib: float


def network(name: str, shapes: Shapes, dtype: torch.dtype, device: str, rank: int = 8) -> Network:
    """A variant's network with random weights, or with none on the meta device."""
    with torch.device(device):
        unet = empty_network(shapes.model.network_class, shapes.network)
    torch.nn.Module.to(unet, dtype).requires_grad_(False).eval()
    inside: Callable[[], AbstractContextManager[Any]] = nullcontext
    present = [target for target in ATTENTION if any(TARGETS[target].fullmatch(path) for path in adaptable(unet))]
    paths = find_targets(unet, present)
    if name.startswith("peft"):
        unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=paths, init_lora_weights="gaussian"))
        for parameter in unet.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(dtype if name == "peft bf16" else torch.float32)
        if name.endswith("autocast"):
            inside = partial(torch.autocast, "cpu", torch.bfloat16)
    elif name == "sdlora":
        adapter = inject(unet, paths, rank, float(rank), 0)
        groups = [Group(adapter.parameters(), 1.0)]
        inside = TrainingModel(unet, adapter, groups, optimizer="adamw", gradient_checkpointing=False).forward_backward
    return Network(unet, shapes, inside, grads_of_input=name == "floor")


@dataclass(frozen=True)
class Network:
    """A network, and what a pass and its way back run inside of."""

    unet: Any
    shapes: Shapes
    inside: Callable[[], AbstractContextManager[Any]]
    grads_of_input: bool

    def pretend(self) -> None:
        """Under a mode for tensors without numbers, take over shapes and types."""
        for module in self.unet.modules():
            for name, p in list(module._parameters.items()):
                if p is not None:
                    fake = torch.empty(p.shape, dtype=p.dtype)
                    module._parameters[name] = torch.nn.Parameter(fake, requires_grad=p.requires_grad)

    def forward(self, size_px: int, device: str) -> Tensor:
        """A forward pass of one square image to its loss."""
        dtype, model = next(self.unet.parameters()).dtype, self.shapes.model
        latent = (1, self.shapes.latent_channels, *[size_px // self.shapes.latent_factor] * 2)
        with torch.device(device):
            x = torch.randn(latent).to(dtype).requires_grad_(self.grads_of_input)
            text = model.empty_text(self.unet, self.shapes.text_encoders, 1)
            text = {name: torch.randn_like(value).to(dtype) for name, value in text.items()}
            timesteps, target = torch.full((1,), 500), torch.randn(latent)
        return (model.denoise(self.unet, x, timesteps, text) - target).pow(2).mean()


def count(name: str, shapes: Shapes, size_px: int, dtype: torch.dtype = torch.bfloat16) -> Counts:
    """Count a variant at any shape without computing it."""
    made = network(name, shapes, dtype, "meta")
    weights = sum(p.nbytes for p in made.unet.parameters())
    # torch knows no autocast for the meta device; tensors that pretend to be on the CPU have it, and take longer.
    pretending = name.endswith("autocast")
    with FakeTensorMode() if pretending else nullcontext():
        if pretending:
            made.pretend()
        with counted() as cost, KernelCounter() as counter, made.inside():
            with saved_for_backward(made.unet) as saved:
                loss = made.forward(size_px, "cpu" if pretending else "meta")
            loss.backward()
    return Counts(counter.kernels, cost.flops / 1e9, saved.held_bytes / 2**20, weights / 2**20)


def count_family(family: Family, resolution_px: int) -> dict[str, Counts]:
    """All variants at a family's true shape."""
    shapes = shapes_of_family(family)
    return {name: count(name, shapes, resolution_px) for name in VARIANTS}


def reduced(family: Family) -> Shapes:
    """A family's shapes with a smaller network."""
    shapes = shapes_of_family(family)
    network = REDUCED[family] if family == "sd1" else {**shapes.network, **REDUCED[family]}
    return replace(shapes, network=network)


def time_reduced(family: Family, dtype: torch.dtype, repeats: int, size_px: int = 256) -> dict[str, list[float]]:
    """Seconds of each variant's step on the reduced network, the variants taking turns."""
    names = [name for name in VARIANTS if dtype == torch.bfloat16 or name != "peft fp32 + autocast"]
    made = {name: network(name, reduced(family), dtype, "cpu") for name in names}
    found: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(repeats + 1):
        for name, each in made.items():
            begin = time.perf_counter()
            with each.inside():
                each.forward(size_px, "cpu").backward()
            if turn > 0:  # the first is a warm-up
                found[name].append(time.perf_counter() - begin)
            each.unet.zero_grad(set_to_none=True)
    return found


def table(counts: dict[str, Counts]) -> str:
    """Counts with their ratios to the floor and to PEFT as its users run it."""
    floor, peft = counts["floor"], counts["peft fp32 + autocast"]
    lines = ["| | kernels | over floor | GFLOP | kept MiB | over PEFT |", "|---|---|---|---|---|---|"]
    for name, c in counts.items():
        lines.append(
            f"| {name} | {c.kernels} | {c.kernels / floor.kernels:.2f} | {c.gflop:.0f} | {c.saved_mib:.0f} | "
            f"{c.saved_mib / peft.saved_mib:.2f} |"
        )
    return "\n".join(lines)


def _family(text: str) -> tuple[Family, int]:
    family, _, size_px = text.partition(":")
    return cast(Family, family), int(size_px)


def main() -> None:
    """Count, and measure if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--time", action="store_true", help="measure seconds of a reduced UNet, too")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--families", nargs="*", type=_family, default=TRUE_SIZES, metavar="FAMILY:SIZE", help="such as sd1:512"
    )
    asked = parser.parse_args()
    counts = {
        f"{FAMILIES[family].title}, {size_px} px": count_family(family, size_px) for family, size_px in asked.families
    }
    seconds: dict[str, dict[str, list[float]]] = {}
    if asked.time:
        for family, _ in asked.families:
            for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
                if family in REDUCED:
                    found = time_reduced(family, dtype, asked.repeats)
                    seconds[f"{FAMILIES[family].title} in {name}"] = found
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if asked.json:
        told = {name: {variant: asdict(c) for variant, c in each.items()} for name, each in counts.items()}
        print(json.dumps({"counts": told, "seconds": seconds, "peak_rss_bytes": peak_kib * 1024}))
        return
    for name, each in counts.items():
        print(f"\n{name}, batch 1, rank 8 on all attention, base in bf16\n\n{table(each)}")
    for name, times in seconds.items():
        peft = statistics.median(times["peft bf16"])
        print(f"\nSeconds of a step, reduced {name}: median (range), over PEFT's")
        for variant, values in times.items():
            middle = statistics.median(values)
            print(f"  {variant}: {middle:.3f} ({min(values):.3f} to {max(values):.3f}), {middle / peft:.2f}")


if __name__ == "__main__":
    main()
