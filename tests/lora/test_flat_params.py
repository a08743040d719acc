"""Flat parameters: the same values, laid end to end."""

from __future__ import annotations

import torch
from diffusers import StableDiffusionPipeline
from helpers.adapters import injected, outputs

from sdlora.lora.flat_params import FlatWeights
from sdlora.lora.inject import AdapterSpec


def make(pipeline: StableDiffusionPipeline, spec: AdapterSpec | None = None) -> tuple[FlatWeights, object]:
    targets = ["cross_attention", "self_attention", "text_encoder"]
    adapter = injected(pipeline, targets, spec or AdapterSpec())
    groups = [adapter.down_parameters(), adapter.up_parameters() + adapter.magnitude_parameters()]
    return FlatWeights(adapter, groups), adapter


def test_leaves_and_parameters_share_memory(pipeline: StableDiffusionPipeline) -> None:
    adapter = injected(pipeline, ["cross_attention", "self_attention", "text_encoder"], AdapterSpec())
    before = [p.detach().clone() for p in adapter.parameters()]
    flat = FlatWeights(adapter, [adapter.down_parameters(), adapter.up_parameters()])
    assert [len(leaves) for leaves in flat.leaves] == [1, 1]
    assert all(torch.equal(p, b) for p, b in zip(adapter.parameters(), before, strict=True))
    with torch.no_grad():
        flat.leaves[1][0].mul_(2)
        adapter.parameters()[0].zero_()
    views = flat.parts([leaf.detach() for leaves in flat.leaves for leaf in leaves])
    expected = [
        torch.zeros_like(before[0]),
        *before[1 : len(before) // 2],
        *(2 * b for b in before[len(before) // 2 :]),
    ]
    assert all(torch.equal(v, e) for v, e in zip(views, expected, strict=True))
    assert all(torch.equal(p, e) for p, e in zip(adapter.parameters(), expected, strict=True))


def test_outputs_inside_live_equal_those_outside(pipeline: StableDiffusionPipeline) -> None:
    flat, adapter = make(pipeline)
    with torch.no_grad():
        before = outputs(pipeline.unet)
        with adapter.disabled():  # type: ignore[attr-defined]
            base = outputs(pipeline.unet)
    with flat.live():
        torch.testing.assert_close(outputs(pipeline.unet), before, rtol=1e-5, atol=1e-6)
        with adapter.disabled():  # type: ignore[attr-defined]
            torch.testing.assert_close(outputs(pipeline.unet), base, rtol=1e-5, atol=1e-6)
    assert all(layer.live is None for layer in adapter.layers.values())  # type: ignore[attr-defined]


def test_each_group_has_one_leaf_per_dtype(pipeline: StableDiffusionPipeline) -> None:
    pipeline.unet.to(torch.bfloat16)
    flat, _ = make(pipeline)
    assert [len(leaves) for leaves in flat.leaves] == [2, 2]
    assert all(leaf.dtype == torch.float32 for leaves in flat.leaves for leaf in leaves)
