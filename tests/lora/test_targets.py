"""Targets: which layers get an adapter, counted by hand on a tiny base."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from sdlora.errors import ConfigError
from sdlora.lora.targets import TARGETS, adaptable, find_targets, network_of, target_of


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
