"""Compiled blocks against the same blocks without, by the compiler that runs use and, for many cases, a quicker one."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from helpers.adapters import UNET_TARGETS, perturb, small_unet
from torch import nn
from torch._dynamo.utils import counters

from sdlora.errors import ConfigError
from sdlora.lora.inject import Adapter, AdapterSpec, find_targets, inject
from sdlora.lora.timestep_rank import TimestepRank
from sdlora.training import model
from sdlora.training.model import TrainingModel
from sdlora.training.optimizers import Group, make_optimizer

ATTENTION = ["self_attention", "cross_attention"]


@pytest.fixture(scope="module")
def unet() -> Any:
    """Five transformer blocks of one width."""
    return small_unet(sample_size=8, layers_per_block=2, mid_block_type=None)


@pytest.fixture
def traced() -> Iterator[None]:
    """Blocks are traced and their derivatives found as ever, but torch's own operations compute them."""
    torch.compiler.set_default_backend("aot_eager")
    yield
    torch.compiler.set_default_backend(None)


class Side:
    """A UNet with an adapter, and the step made of them."""

    def __init__(self, unet: Any, targets: list[str], spec: AdapterSpec | None = None, **options: Any) -> None:
        self.unet = copy.deepcopy(unet)
        self.adapter: Adapter = inject(self.unet, find_targets(self.unet, targets), 4, 6.0, 0, spec=spec)
        perturb(self.adapter)
        settings = {"optimizer": "adamw", "gradient_checkpointing": False} | options
        groups = [Group(self.adapter.parameters(), 1.0)]
        self.step = TrainingModel(self.unet, self.adapter, groups, **settings)
        self.optimizer = make_optimizer("adamw", self.step.groups, learning_rate=1e-4, weight_decay=1e-2)

    def answer(self, seed: int = 0, size: int = 8, text_is_trained: bool = False) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        dtype = self.unet.dtype
        x = torch.randn(2, 4, size, 8, generator=generator).to(dtype)
        text = torch.randn(2, 77, 48, generator=generator).to(dtype).requires_grad_(text_is_trained)
        found: torch.Tensor = self.unet(x, torch.tensor([20, 900]), text).sample
        return found

    def gradients(self, **given: Any) -> list[torch.Tensor]:
        for parameter in self.step.parameters():
            parameter.grad = None
        with self.step.forward_backward():
            self.answer(**given).float().pow(2).mean().backward()
        return self.step.by_layer([p.grad for p in self.step.parameters() if p.grad is not None])

    def train(self, num_steps: int) -> None:
        for index in range(num_steps):
            self.gradients(seed=index)
            nn.utils.clip_grad_norm_(self.step.parameters(), 1.0)
            self.optimizer.step()


def worst(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """The greatest relative error of any tensor."""
    assert len(found) == len(expected) > 0
    return max(((a - b).norm() / b.norm()).item() for a, b in zip(found, expected, strict=True))


@contextmanager
def compilations() -> Iterator[list[int]]:
    """How many graphs were compiled inside the block."""
    found: list[int] = []
    before = counters["stats"]["unique_graphs"]
    yield found
    found.append(counters["stats"]["unique_graphs"] - before)


def test_compiled_steps_train_the_same_and_blocks_share_a_graph(unet: Any) -> None:
    plain, own = Side(unet, ATTENTION), Side(unet, ATTENTION, compiled=True)
    counters.clear()
    assert worst(own.gradients(), plain.gradients()) <= 1e-4
    # One graph for the block whose input needs no gradient, and one for the four others.
    assert sum(isinstance(module, BasicTransformerBlock) for module in own.unet.modules()) == 5
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]
    plain.train(6)
    own.train(6)
    assert counters["stats"]["unique_graphs"] == 2
    assert worst(own.adapter.parameters(), plain.adapter.parameters()) <= 1e-4
    # What is drawn with the adapter, and with it switched off, is not compile.
    twin = Side(unet, ATTENTION)
    twin.adapter.load(own.adapter.state())
    with torch.no_grad(), compilations() as num:
        assert torch.equal(own.answer(size=16), twin.answer(size=16))
        with own.adapter.disabled(), twin.adapter.disabled():
            assert torch.equal(own.answer(), twin.answer())
    assert num == [0]


@pytest.mark.parametrize(
    ("targets", "spec", "options"),
    [
        (["cross_attention"], None, {}),
        (ATTENTION, None, {"gradient_checkpointing": True}),
        (UNET_TARGETS, None, {"gradient_checkpointing": True}),
        pytest.param(ATTENTION, None, {"optimizer": "adafactor"}, marks=pytest.mark.slow),
        (ATTENTION, AdapterSpec(target_ranks={"self_attention": 2}, rslora=True), {}),
        pytest.param(ATTENTION, AdapterSpec(init="orthogonal"), {}, marks=pytest.mark.slow),
        pytest.param(ATTENTION, AdapterSpec(timestep_rank=TimestepRank(1, 1.0)), {}, marks=pytest.mark.slow),
        pytest.param(["cross_attention", "mlp"], AdapterSpec(dora=True), {}, marks=pytest.mark.slow),
    ],
)
def test_compiled_gradients_of_every_kind_of_adapter_are_the_same(
    unet: Any, targets: list[str], spec: AdapterSpec | None, options: dict[str, Any], traced: None
) -> None:
    exact = copy.deepcopy(unet).double()
    plain, own = Side(exact, targets, spec, **options), Side(exact, targets, spec, compiled=True, **options)
    counters.clear()
    assert worst(own.gradients(), plain.gradients()) <= 1e-5
    assert counters["stats"]["unique_graphs"] > 0
    assert not counters["graph_break"]


def test_compiled_gradients_in_bfloat16_are_as_accurate(unet: Any, traced: None) -> None:
    low = copy.deepcopy(unet).to(torch.bfloat16)
    exact = copy.deepcopy(low).double()
    expected, *found = (
        torch.cat([gradient.flatten() for gradient in side.gradients()])
        for side in (Side(exact, ATTENTION), Side(low, ATTENTION), Side(low, ATTENTION, compiled=True))
    )
    plain, own = (((one - expected).norm() / expected.norm()).item() for one in found)
    assert own <= 1.2 * plain


def test_reused_base_follows_the_next_runs_setting(unet: Any, traced: None) -> None:
    side = Side(unet, ATTENTION, compiled=True)
    with compilations() as num:
        first = side.gradients()
    assert num == [2]
    groups = [Group(side.adapter.parameters(), 1.0)]
    for choice, expected in ((False, 0), (True, 2)):
        side.step = TrainingModel(
            side.unet, side.adapter, groups, optimizer="adamw", gradient_checkpointing=False, compiled=choice
        )
        with compilations() as num:
            assert worst(side.gradients(), first) <= 1e-4
        assert num == [expected]


def test_kinds_past_the_limit_run_uncompiled(unet: Any, traced: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "MAX_KINDS", 2)
    plain, own = Side(unet, ATTENTION), Side(unet, ATTENTION, compiled=True)
    with compilations() as num:
        for given in ({}, {"size": 4}, {}):
            assert worst(own.gradients(**given), plain.gradients(**given)) <= 1e-4
    assert num == [2]


def test_missing_compiler_is_refused_before_training(
    unet: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What was compiled before would be found again.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    with (
        torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}),
        pytest.raises(ConfigError, match=r"needs a C\+\+ compiler such as g\+\+.*leave train\.compile at false"),
    ):
        Side(unet, ATTENTION, compiled=True)


def test_failed_compilation_says_how_to_resume(unet: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise ValueError("nothing works")

    monkeypatch.setattr(model, "_check_compiler", lambda _: None)
    torch.compiler.set_default_backend(fail)
    try:
        with pytest.raises(ConfigError, match=r"nothing works.*--resume --set train\.compile=false"):
            Side(unet, ATTENTION, compiled=True).gradients()
    finally:
        torch.compiler.set_default_backend(None)
