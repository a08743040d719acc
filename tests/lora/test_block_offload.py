"""Blocks that wait on the host compute the same, bit for bit, and at most two of them are on the device."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.runs import digests, metrics, run, without_times
from helpers.tiny import make_tiny, make_tiny_klein, make_tiny_z_image
from torch import Tensor, nn

from sdlora.lora import block_offload
from sdlora.lora.block_offload import BlockOffload, visiting_bytes
from sdlora.lora.inject import AdapterSpec, find_targets, inject
from sdlora.lora.quantize import Quantization, quantize_linears
from sdlora.models import flow_model
from sdlora.models.base import BaseModel
from sdlora.models.load import LoadOptions, load_base
from sdlora.run.run import Stopped
from sdlora.training.model import TrainingModel
from sdlora.training.optimizers import Group
from sdlora.training.train_step import StepResult, TrainStep

CPU = torch.device("cpu")
MAKERS: dict[str, Callable[[Path], None]] = {
    "sd1": lambda folder: make_tiny("sd1", folder),
    "sdxl": lambda folder: make_tiny("sdxl", folder),
    "z-image": make_tiny_z_image,
    "klein": make_tiny_klein,
}
TARGETS = {"sd1": ["cross_attention", "self_attention", "mlp"], "sdxl": ["cross_attention", "self_attention", "conv"]}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    for name, make in MAKERS.items():
        make(root / name)
    return {name: root / name for name in MAKERS}


def load(folder: Path, *, offload: bool, quantization: Any = "none") -> BaseModel:
    # Weights in a mapped file need not be aligned as those of a block are, and sums of others round in other ways.
    base = load_base(
        str(folder), device=CPU, dtype=torch.float32, options=LoadOptions(quantization=quantization, offload=offload)
    )
    for parameter in () if offload else base.network.parameters():
        parameter.data = parameter.data.clone()
    return base


def gradients(
    base: BaseModel, targets: list[str], *, spec: AdapterSpec | None = None, checkpointing: bool = False
) -> list[Tensor]:
    """Losses of two steps of two micro-batches each, and their gradients."""
    network = base.network
    adapter = inject(network, find_targets(network, targets), 2, 3.0, 0, spec=spec)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.1)
    model = TrainingModel(
        network, adapter, [Group(adapter.parameters(), 1.0)], optimizer="adamw", gradient_checkpointing=checkpointing
    )
    for offloaded in base.offloaded.values():
        offloaded.lay_out()
    network.train()
    text = base.batched([{k: v[0] for k, v in base.encode_captions([c]).items()} for c in ("a", "a red ball")])
    text |= {"sizes": torch.ones(2, 6)} if "pooled" in text else {}
    channels = base.vae.config.latent_channels * (4 if "Flux2" in type(network).__name__ else 1)
    found = []
    for _ in range(2):
        for _ in range(2):
            noisy = torch.randn(2, channels, 4, 4, generator=draw)
            with model.forward_backward():
                loss = base.predict(noisy, torch.tensor([20, 900]), text).square().mean()
                loss.backward()
            found.append(loss.detach())
        found += model.by_layer([p.grad.clone() for p in model.parameters() if p.grad is not None])
        for parameter in model.parameters():
            parameter.grad = None
    network.eval()
    adapter.remove()
    return found


def most_resident(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of blocks on the device after every use of a block of the network."""
    seen, offloaded, plain = list[int](), base.offloaded[base.network], BlockOffload._use

    def use(self: BlockOffload, block: Any) -> None:
        plain(self, block)
        if self is offloaded:
            seen.append(self.resident_bytes)

    monkeypatch.setattr(BlockOffload, "_use", use)
    return seen


@pytest.mark.parametrize("family", MAKERS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_the_same_with_two_blocks_at_a_time(
    family: str, checkpointing: bool, bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flow_model, "MAX_TOKENS", 96)
    targets = TARGETS.get(family, ["attention", "mlp"])
    expected = gradients(load(bases[family], offload=False), targets, checkpointing=checkpointing)
    base = load(bases[family], offload=True)
    all_bytes, two_bytes = visiting_bytes(base.network, base.block_lists)
    seen = most_resident(base, monkeypatch)
    found = gradients(base, targets, checkpointing=checkpointing)
    assert len(found) == len(expected) > 8
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    padding = 512 * 256
    assert 0 < max(seen) <= two_bytes + padding
    base.offloaded[base.network].release()
    assert base.offloaded[base.network].resident_bytes == 0
    assert all_bytes > 0


@pytest.mark.parametrize(
    ("family", "quantization", "spec"),
    [
        ("z-image", "int8", None),
        ("klein", "fp8", None),
        ("sd1", "int8", None),
        ("z-image", "none", AdapterSpec(dora=True)),
        ("sd1", "none", AdapterSpec(init="pissa")),
    ],
)
def test_packed_weights_and_other_adapters_are_the_same(
    family: str, quantization: str, spec: AdapterSpec | None, bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flow_model, "MAX_TOKENS", 96)
    targets = TARGETS.get(family, ["attention", "mlp"])
    plain, away = (load(bases[family], offload=offload, quantization=quantization) for offload in (False, True))
    expected, found = gradients(plain, targets, spec=spec), gradients(away, targets, spec=spec)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    # What the base is left as serves another run.
    again = gradients(away, targets, spec=spec)
    assert all(torch.equal(one, other) for one, other in zip(again, expected, strict=True))


class Chain(nn.Module):
    """Three blocks on one after another, each a product that keeps its input, behind a layer of their network."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(width, width)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.SiLU()) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize("kind", ["int8", "fp8", "nf4"])
def test_packed_chain_is_the_same(kind: Quantization) -> None:
    plain = Chain().requires_grad_(False)
    quantize_linears(plain, kind, ".blocks.")
    away = copy.deepcopy(plain)
    BlockOffload(away, ("blocks",), CPU)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    own, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    away(own).sin().sum().backward()
    plain(other).sin().sum().backward()
    assert own.grad is not None and other.grad is not None
    assert torch.equal(own.grad, other.grad)


def test_the_next_block_is_fetched_while_one_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    network = Chain().requires_grad_(False)
    offload = BlockOffload(network, ("blocks",), CPU)
    late, computing = list[int](), list[int]()

    def fetch(self: Any, copies: Any) -> None:
        index = [block is self.module for block in network.blocks].index(True)
        if offload._active is None:
            late.append(index)
        plain_fetch(self, copies)

    plain_fetch = block_offload._Block.fetch
    monkeypatch.setattr(block_offload._Block, "fetch", fetch)
    for index, block in enumerate(network.blocks):
        block.register_forward_hook(lambda *_, index=index: computing.append(index))
    for step in range(3):
        late.clear()
        network(torch.randn(2, 64, requires_grad=True)).sum().backward()
        # That the backward pass is followed by another step is seen at its first step.
        assert late == [[0, 1, 2, 1, 0], [1], []][step]
    with torch.no_grad():
        late.clear()
        for _ in range(3):
            network(torch.randn(2, 64))
    # Where there is no backward pass, another forward pass is expected instead once it was seen.
    assert late == [0, 1]
    assert computing == [0, 1, 2] * 6


def test_blocks_compute_with_what_is_on_the_device_alone() -> None:
    network = Chain().requires_grad_(False)
    expected = network(torch.ones(2, 64))
    offload = BlockOffload(network, ("blocks",), CPU)
    seen = []

    def spoil(block: nn.Module, _: Any) -> None:
        (own,) = (one for one in offload._blocks if one.module is block)
        kept = own.host.clone()
        own.host.fill_(0)
        seen.append((own, kept))

    for block in network.blocks:
        block.register_forward_pre_hook(spoil)
    assert torch.equal(network(torch.ones(2, 64)), expected)
    assert len(seen) == 3
    offload.release()
    assert all(bool((block[0].weight == 0).all()) for block in network.blocks)  # type: ignore[index]


def test_blocks_leave_the_device_with_the_rest_of_their_network() -> None:
    network = Chain().requires_grad_(False)
    # The same memory by another name, so that leaving it can be seen.
    offload = BlockOffload(network, ("blocks",), torch.device("cpu", 0))
    network(torch.ones(2, 64))
    assert offload.resident_bytes > 0
    offload.move(torch.device("cpu", 0))
    assert offload.resident_bytes > 0
    offload.move(CPU)
    assert offload.resident_bytes == 0


def test_a_run_is_the_same_and_resumes_in_the_same_bytes(
    tmp_path: Path, overrides: list[str], bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [
        *overrides, f"base.path={bases['z-image']}", 'lora.targets=["attention"]', "copycheck.enabled=true",
        "train.gradient_checkpointing=true", "train.gradient_accumulation_steps=2", "cache.max_text_gib=0",
    ]  # fmt: skip
    whole, cut = tmp_path / "a" / "run", tmp_path / "b" / "run"
    for folder in (whole, cut):
        folder.parent.mkdir()
    run(whole, options)
    done, original = [0], TrainStep.run

    def count(self: TrainStep, step: int, micro_batch_size: int) -> StepResult:
        done[0] += 1
        return original(self, step, micro_batch_size)

    monkeypatch.setattr(TrainStep, "run", count)
    with pytest.raises(Stopped):
        run(cut, options, should_stop=lambda: done[0] >= 1)
    run(cut, [*options, "base.offload=blocks"], resume=True)
    assert digests(cut) == digests(whole)
    assert without_times(metrics(cut)) == without_times(metrics(whole))


def test_all_but_the_blocks_move_to_another_device() -> None:
    network = nn.Module()
    network.first, network.blocks = nn.Linear(2, 2), nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
    network.requires_grad_(False)
    offload = BlockOffload(network, ["blocks"], CPU)
    before = {name: parameter.data_ptr() for name, parameter in network.named_parameters()}
    offload.move(torch.device("cpu", 0))  # the same memory by another name: what moves is copied
    after = {name: parameter.data_ptr() for name, parameter in network.named_parameters()}
    assert {name for name in before if before[name] != after[name]} == {"first.weight", "first.bias"}
