"""The lean step against PEFT and torch's own operations."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from counts import saved_for_backward
from diffusers import UNet2DConditionModel
from diffusers.models.activations import GEGLU
from diffusers.models.resnet import ResnetBlock2D
from helpers.adapters import UNET_TARGETS, perturb, small_unet
from helpers.peft_twin import peft_twin
from torch import nn

from sdlora.lora.inject import Adapter, AdapterSpec, find_targets, inject
from sdlora.training.model import TrainingModel, keep_little
from sdlora.training.optimizers import Group, make_optimizer


@pytest.fixture(scope="module")
def unet() -> Any:
    return small_unet()


def adapted(unet: Any, targets: list[str], spec: AdapterSpec | None = None, moved: bool = True) -> Adapter:
    adapter = inject(unet, find_targets(unet, targets), 4, 6.0, 0, spec=spec)
    if moved:
        perturb(adapter)
    return adapter


def lean(unet: Any, adapter: Adapter, **options: Any) -> TrainingModel:
    groups = [Group(adapter.parameters(), 1.0)]
    return TrainingModel(unet, adapter, groups, **{"optimizer": "adamw", "gradient_checkpointing": False} | options)


def loss(unet: Any, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    dtype = unet.dtype
    x = torch.randn(2, 4, 16, 16, generator=generator).to(dtype)
    text = torch.randn(2, 77, 48, generator=generator).to(dtype)
    answer: torch.Tensor = unet(x, torch.tensor([20, 900]), text).sample
    return answer.float().pow(2).mean()


def gradients(step: TrainingModel, unet: Any) -> list[torch.Tensor]:
    for parameter in step.parameters():
        parameter.grad = None
    with step.forward_backward():
        loss(unet).backward()
    return step.by_layer([p.grad for p in step.parameters() if p.grad is not None])


def worst(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """The greatest relative error of any tensor."""
    return max(((a - b).norm() / b.norm()).item() for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("targets", [["cross_attention"], ["self_attention", "cross_attention"], UNET_TARGETS])
def test_gradients_equal_pefts(unet: Any, targets: list[str], checkpointing: bool) -> None:
    own, other = copy.deepcopy(unet), copy.deepcopy(unet)
    adapter = adapted(own, targets)
    twin = peft_twin(other, adapter)
    value = loss(other)
    value.backward()
    expected = [twin[path][place].grad for place in (0, 1) for path in adapter.layers]
    step = lean(own, adapter, gradient_checkpointing=checkpointing)
    with step.forward_backward():
        assert loss(own).item() == pytest.approx(value.item(), rel=1e-6)
    assert worst(gradients(step, own), [g for g in expected if g is not None]) <= 1e-5


@pytest.mark.parametrize(
    "spec",
    [
        AdapterSpec(dora=True),
        AdapterSpec(init="orthogonal"),
        AdapterSpec(target_ranks={"self_attention": 2}),
        AdapterSpec(rslora=True),
    ],
)
def test_gradients_of_other_kinds_of_adapter_equal_the_plain_models(unet: Any, spec: AdapterSpec) -> None:
    own, other = copy.deepcopy(unet).double(), copy.deepcopy(unet).double()
    targets = ["self_attention", "cross_attention"]
    adapter, plain = adapted(own, targets, spec), adapted(other, targets, spec)
    loss(other).backward()
    expected = [p.grad for p in plain.parameters() if p.grad is not None]
    assert worst(gradients(lean(own, adapter), own), expected) <= 1e-5


def test_masked_ranks_get_no_gradient(unet: Any) -> None:
    own = copy.deepcopy(unet)
    adapter = adapted(own, ["self_attention", "cross_attention"])
    step = lean(own, adapter)
    for layer in adapter.layers.values():
        layer.rank_mask = torch.tensor([[1.0, 1.0, 0.0, 0.0]] * 2)
    found = gradients(step, own)
    for down, up in zip(found[: len(found) // 2], found[len(found) // 2 :], strict=True):
        assert down[:2].abs().sum() > 0
        assert down[2:].abs().sum() == 0
        assert up[:, 2:].abs().sum() == 0


def test_ten_steps_end_in_the_same_weights_as_with_peft(unet: Any) -> None:
    own, other = copy.deepcopy(unet), copy.deepcopy(unet)
    adapter = adapted(own, ["self_attention", "cross_attention"], moved=False)
    twin = peft_twin(other, adapter)
    start = [p.detach().clone() for p in adapter.parameters()]
    step = lean(own, adapter)
    optimizer = make_optimizer("adamw", step.groups, learning_rate=1e-4, weight_decay=1e-2)
    theirs = [p for pair in twin.values() for p in pair]
    reference = torch.optim.AdamW(theirs, lr=1e-4, weight_decay=1e-2)
    for index in range(10):
        with step.forward_backward():
            loss(own, index).backward()
        loss(other, index).backward()
        nn.utils.clip_grad_norm_(step.parameters(), 1.0)
        nn.utils.clip_grad_norm_(theirs, 1.0)
        for each in (optimizer, reference):
            each.step()
            each.zero_grad()
    moved = [p - s for p, s in zip(adapter.parameters(), start, strict=True)]
    expected = [twin[path][place] for place in (0, 1) for path in adapter.layers]
    # Adam divides by the gradient's size, so that elements of almost none differ most.
    assert worst(moved, [e - s for e, s in zip(expected, start, strict=True)]) < 1e-2


def test_every_element_of_a_moves_on_a_bfloat16_base(unet: Any) -> None:
    own = copy.deepcopy(unet).to(torch.bfloat16)
    adapter = adapted(own, ["self_attention", "cross_attention"], moved=False)
    before = [p.detach().clone() for p in adapter.down_parameters()]
    step = lean(own, adapter)
    optimizer = make_optimizer("adamw", step.groups, learning_rate=1e-4, weight_decay=1e-2)
    for index in range(50):
        with step.forward_backward():
            loss(own, index).backward()
        optimizer.step()
        optimizer.zero_grad()
    for parameter, start in zip(adapter.down_parameters(), before, strict=True):
        assert parameter.dtype == torch.float32
        assert bool((parameter != start).all())


def test_optimizer_gets_few_long_tensors(unet: Any) -> None:
    own = copy.deepcopy(unet)
    adapter = adapted(own, ["cross_attention"])
    step = lean(own, adapter)
    (leaf,) = step.parameters()
    assert leaf.numel() == adapter.num_parameters()
    with torch.no_grad():
        leaf.fill_(3.0)
    assert all(bool((p == 3.0).all()) for p in adapter.parameters())
    by_matrix = lean(copy.deepcopy(unet), adapter, optimizer="adafactor")
    assert len(by_matrix.parameters()) == len(adapter.parameters())


def test_step_keeps_less_for_the_backward_pass_than_pefts(unet: Any) -> None:
    own, other = copy.deepcopy(unet), copy.deepcopy(unet)
    adapter = adapted(own, ["self_attention", "cross_attention"])
    peft_twin(other, adapter)
    step = lean(own, adapter)
    kept = []
    for network in (own, other):
        with step.forward_backward(), saved_for_backward(network) as saved:
            value = loss(network)
        kept.append(saved.held_bytes)
        del value
    assert kept[0] < 0.75 * kept[1]


def make_unet() -> Any:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, cross_attention_dim=16,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=4,
    ).requires_grad_(False).eval()  # fmt: skip


def answer(unet: Any, x: torch.Tensor) -> torch.Tensor:
    text = torch.randn(2, 77, 16, generator=torch.Generator().manual_seed(1))
    found: torch.Tensor = unet(x, torch.tensor([5, 900]), text).sample
    return found


def test_outputs_and_gradients_are_bit_identical_and_less_is_kept() -> None:
    plain = make_unet()
    lean = copy.deepcopy(plain)
    keep_little(lean)
    assert list(lean.state_dict()) == list(plain.state_dict())
    results = []
    for unet in (plain, lean):
        x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
        with torch.no_grad():
            before = answer(unet, x)
        with saved_for_backward(unet) as saved:
            found = answer(unet, x)
        found.square().sum().backward()
        assert torch.equal(before, found)
        results.append((found, x.grad, saved.held_bytes))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert results[1][2] < 0.75 * results[0][2]


def test_trained_convolutions_keep_what_they_need() -> None:
    unet = make_unet()
    keep_little(unet)
    unet.conv_in.requires_grad_(True)
    answer(unet, torch.ones(2, 4, 8, 8)).sum().backward()
    assert unet.conv_in.weight.grad.abs().sum() > 0


def test_each_operation_keeps_what_cannot_be_recomputed() -> None:
    x = torch.randn(2, 16, 8, 8, requires_grad=True)
    block = ResnetBlock2D(in_channels=16, temb_channels=None, groups=4).requires_grad_(False)
    gate = GEGLU(16, 32).requires_grad_(False)
    holder = nn.Module()
    holder.block, holder.gate = block, gate
    holder.conv_norm_out = holder.conv_act = None
    keep_little(holder)  # type: ignore[arg-type]
    size = 4 * x.numel()
    with saved_for_backward(holder) as saved:
        block(x, None)
    # Its input, what comes between its convolutions, and the groups' means and deviations.
    assert saved.held_bytes == 2 * size + 4 * (2 * 4 * 2 * 2)
    tokens = torch.randn(2, 64, 16, requires_grad=True)
    with saved_for_backward(holder) as saved:
        gate(tokens)
    assert saved.held_bytes == 4 * 2 * 64 * 64
