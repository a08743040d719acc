"""Targets: which layers get an adapter, counted by hand on a tiny base."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from helpers.adapters import LINEAR_TARGETS, UNET_TARGETS, injected, outputs, trained
from torch import nn

from sdlora.errors import ConfigError
from sdlora.lora.inject import (
    TARGETS,
    AdapterSpec,
    adaptable,
    find_targets,
    inject,
    inject_state,
    network_of,
    target_of,
)


def test_linear_targets_find_their_layers(unet: Any) -> None:
    cross = find_targets(unet, ["cross_attention"])
    assert len(cross) == 4 * 4  # four projections in one down, one mid and two up blocks
    assert all(".attn2." in path for path in cross)
    assert {path.split(".attn2.")[1] for path in cross} == {"to_q", "to_k", "to_v", "to_out.0"}
    assert len(find_targets(unet, ["self_attention"])) == 16
    assert len(find_targets(unet, ["mlp"])) == 8
    together = find_targets(unet, LINEAR_TARGETS)
    assert len(together) == len(set(together)) == 40
    assert {target_of(path) for path in together} == set(LINEAR_TARGETS)


@pytest.mark.parametrize(
    ("name", "count", "example"),
    [
        ("projection", 8, "down_blocks.0.attentions.0.proj_in"),
        ("conv", 23, "down_blocks.0.downsamplers.0.conv"),
        ("text_encoder", 6, "text_encoder.encoder.layers.0.self_attn.q_proj"),
    ],
)
def test_other_targets_find_their_layers(pipeline: Any, name: str, count: int, example: str) -> None:
    paths = find_targets(pipeline.unet, [name], [pipeline.text_encoder])
    assert len(paths) == count
    assert example in paths
    assert not {"conv_in", "conv_out"} & set(paths)
    assert {target_of(path) for path in paths} == {name}


@pytest.mark.parametrize(
    ("names", "selected"),
    [
        (["up"], r"up_blocks\..*"), (["mid", "!conv"], r"mid_block\.attentions.*"), (["3-5", "!*.ff.*"], ""),
        (["up_blocks.1.*attn2*"], r"up_blocks\.1\..*\.attn2\..*"),
        (["cross_attention", "!down", r"!re:.*\.to_[qk]"], r"(mid|up).*\.attn2\.(to_v|to_out\.0)"),
        (["text_encoder_1"], r"text_encoder\..*"),
    ],
)  # fmt: skip
def test_layers_are_chosen_by_name(pipeline: Any, names: list[str], selected: str) -> None:
    layers = [path for path in adaptable(pipeline.unet, [pipeline.text_encoder]) if target_of(path)]
    # The tiny base has two down blocks of one ResNet: 0 to 3, the middle 4, then the output blocks.
    pattern = selected or r"(down_blocks\.1|mid_block|up_blocks\.0\.resnets\.0).*(?<!ff).*"
    expected = [path for path in layers if re.fullmatch(pattern, path) and (selected or ".ff." not in path)]
    assert expected
    assert find_targets(pipeline.unet, names, [pipeline.text_encoder]) == expected


@pytest.mark.parametrize("names", [["cross_attention", "!90"], ["time_embedding.*"], ["mlp", "!mlp"], ["foo*"]])
def test_a_selector_of_no_layer_is_refused(pipeline: Any, names: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"lora\.targets: .*(matches no layer|leave no layer)"):
        find_targets(pipeline.unet, names)


def test_ranks_and_alphas_differ_by_block_and_pattern(pipeline: Any) -> None:
    spec = AdapterSpec(target_ranks={"mlp": 3, "up": 2, "*.attn2.to_q": 5}, target_alphas={"4": 8.0})
    adapter = injected(pipeline, LINEAR_TARGETS, spec, rank=4, alpha=2.0)
    for path, layer in adapter.layers.items():
        rank = 3 if ".ff." in path else 4
        rank = 5 if path.endswith("attn2.to_q") else 2 if path.startswith("up_") else rank
        assert (layer.rank, layer.alpha) == (rank, 8.0 if path.startswith("mid_") else 2.0)
    assert adapter.described().startswith("40 layers are trained: 16 cross_attention, 16 self_attention, 8 mlp")
    assert adapter.described().endswith("; ranks 2, 3, 4, 5.")
    adapter.remove()
    with pytest.raises(ConfigError, match=r"lora\.target_ranks: 'zz\*' matches none of the 40 layers"):
        injected(pipeline, LINEAR_TARGETS, AdapterSpec(target_ranks={"zz*": 4}))


def test_ranks_and_alphas_differ_by_target(pipeline: Any) -> None:
    spec = AdapterSpec(target_ranks={"mlp": 3}, target_alphas={"conv": 6.0}, rslora=True)
    adapter = injected(pipeline, [*UNET_TARGETS, "text_encoder"], spec, rank=4, alpha=2.0)
    for path, layer in adapter.layers.items():
        rank = 3 if target_of(path) == "mlp" else 4
        assert layer.rank == rank
        assert layer.scale == pytest.approx((6.0 if target_of(path) == "conv" else 2.0) / rank**0.5, rel=1e-6)


def test_disabled_adapter_leaves_the_text_encoder_plain(pipeline: Any) -> None:
    tokens = torch.arange(77)[None]
    before = pipeline.text_encoder(tokens).last_hidden_state
    adapter = injected(pipeline, ["cross_attention", "text_encoder"], AdapterSpec())
    assert adapter.adapts_text
    assert not torch.equal(pipeline.text_encoder(tokens).last_hidden_state, before)
    with adapter.disabled():
        assert torch.equal(pipeline.text_encoder(tokens).last_hidden_state, before)
    adapter.remove()
    assert torch.equal(pipeline.text_encoder(tokens).last_hidden_state, before)


@pytest.mark.parametrize("spec", [AdapterSpec(init="pissa"), AdapterSpec(init="orthogonal"), AdapterSpec(dora=True)])
def test_state_of_every_kind_injects_back(pipeline: Any, spec: AdapterSpec) -> None:
    adapter = injected(pipeline, UNET_TARGETS, spec)
    kept, expected = adapter.state(), outputs(pipeline.unet)
    adapter.remove()
    inject_state(pipeline.unet, kept)
    assert torch.equal(outputs(pipeline.unet), expected)


def test_dropout_ends_with_its_block(pipeline: Any) -> None:
    adapter = injected(pipeline, ["cross_attention"], AdapterSpec(dropout=0.5))
    before = outputs(pipeline.unet)
    with pytest.raises(RuntimeError), adapter.dropping(0, [("a", 1), ("b", 1)]):
        inside = outputs(pipeline.unet)
        raise RuntimeError
    assert not torch.equal(inside, before)
    assert torch.equal(outputs(pipeline.unet), before)
    with adapter.dropping(0, [("a", 1), ("b", 1)]):
        assert torch.equal(outputs(pipeline.unet), inside)
    with adapter.dropping(0, [("a", 2), ("b", 1)]):
        again = outputs(pipeline.unet)
    assert not torch.equal(again[0], inside[0])
    torch.testing.assert_close(again[1], inside[1])


def test_target_without_layers_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"lora\.targets.*'mlp'"):
        find_targets(torch.nn.Sequential(torch.nn.Linear(2, 2)), ["mlp"])


def test_remove_restores_the_same_modules(unet: Any) -> None:
    modules, before = dict(unet.named_modules()), outputs(unet)
    adapter = trained(unet)
    assert not torch.equal(outputs(unet), before)
    adapter.remove()
    assert {name: id(module) for name, module in unet.named_modules()} == {n: id(m) for n, m in modules.items()}
    assert torch.equal(outputs(unet), before)


def test_disabled_restores_each_layers_state(unet: Any) -> None:
    before = outputs(unet)
    adapter = trained(unet)
    first = next(iter(adapter.layers.values()))
    first.enabled = False
    changed = outputs(unet)
    with pytest.raises(RuntimeError), adapter.disabled():
        assert torch.equal(outputs(unet), before)
        raise RuntimeError
    assert torch.equal(outputs(unet), changed)
    assert not first.enabled
    adapter.set_strength(0.0)
    assert torch.equal(outputs(unet), before)


def test_initial_weights_depend_on_seed_and_path_alone(unet: Any) -> None:
    paths = find_targets(unet, ["cross_attention"])
    starts = []
    for seed, chosen in ((0, paths), (0, paths[5:]), (1, paths)):
        adapter = inject(unet, chosen, 4, 4.0, seed)
        adapter.remove()
        starts.append(adapter.state())
    assert all(torch.equal(starts[0][path].down, starts[1][path].down) for path in paths[5:])
    assert not torch.equal(starts[0][paths[0]].down, starts[2][paths[0]].down)
    assert not torch.equal(starts[0][paths[0]].down, starts[0][paths[1]].down)


def test_state_is_a_copy_and_loads_back(unet: Any) -> None:
    adapter = trained(unet)
    kept, expected = adapter.state(), outputs(unet)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(1.0)
    assert not torch.equal(outputs(unet), expected)
    adapter.load(kept)
    assert torch.equal(outputs(unet), expected)
    adapter.remove()
    inject_state(unet, kept)
    assert torch.equal(outputs(unet), expected)
    with pytest.raises(ConfigError):
        adapter.load(dict(list(kept.items())[1:]))


@pytest.mark.parametrize(
    ("path", "target"),
    [
        ("down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0", "cross_attention"),
        ("mid_block.attentions.0.transformer_blocks.0.attn1.to_q", "self_attention"),
        ("up_blocks.1.attentions.2.transformer_blocks.0.ff.net.0.proj", "mlp"),
        ("up_blocks.1.attentions.2.proj_in", "projection"),
        ("down_blocks.0.resnets.1.conv1", "conv"),
        ("down_blocks.0.downsamplers.0.conv", "conv"),
        ("text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj", "text_encoder"),
        ("time_embedding.linear_1", None),
        ("conv_in", None),
    ],
)
def test_path_belongs_to_one_target(path: str, target: str | None) -> None:
    assert target_of(path) == target
    assert sum(pattern.fullmatch(path) is not None for pattern in TARGETS.values()) == (target is not None)


def test_every_path_found_is_an_adaptable_layer(unet: Any) -> None:
    layers = dict(unet.named_modules())
    found = find_targets(unet, ["cross_attention", "conv"])
    assert found == [path for path in adaptable(unet) if path in set(found)], "in the network's order"
    assert all(isinstance(layers[path], nn.Linear | nn.Conv2d) for path in found)
    assert {target_of(path) for path in found} == {"cross_attention", "conv"}


def test_target_without_layers_is_refused_with_those_that_exist(unet: Any) -> None:
    with pytest.raises(ConfigError, match=r"'text_encoder'.*cross_attention"):
        find_targets(unet, ["text_encoder"])


def test_network_is_the_prefix_of_the_path() -> None:
    assert network_of("text_encoder_2.text_model.x") == "text_encoder_2"
    assert network_of("text_encoder.text_model.x") == "text_encoder"
    assert network_of("down_blocks.0.conv") == "unet"
