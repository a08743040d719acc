"""Selectors: what names layers, and how blocks are numbered."""

from __future__ import annotations

import re

import pytest

from sdlora.common.selectors import KINDS, STAGES, Blocks, check_selector
from sdlora.lora_files.names import authors_name, kohya_name

SD1, XL = Blocks(4, 2), Blocks(3, 2)


@pytest.mark.parametrize("selector", [*KINDS, *STAGES, "4", "0-7", "up_blocks.1.*", r"re:.*\.attn2\..*"])
def test_selectors_are_accepted(selector: str) -> None:
    assert check_selector(selector) == selector


@pytest.mark.parametrize(
    ("selector", "hint"),
    [("cross_atention", "cross_attention"), ("7-0", "write 0-7"), ("re:(", "regular expression"), ("foo", "kinds are")],
)
def test_what_is_no_selector_is_refused(selector: str, hint: str) -> None:
    with pytest.raises(ValueError, match=re.escape(hint)):
        check_selector(selector)


def test_numbers_of_xl_are_those_of_its_authors_blocks() -> None:
    layers = [
        *(f"down_blocks.{i}.resnets.{j}.conv1" for i in range(3) for j in range(2)),
        *(f"down_blocks.{i}.downsamplers.0.conv" for i in range(2)),
        *(f"down_blocks.{i}.attentions.{j}.proj_in" for i in (1, 2) for j in range(2)),
        "mid_block.resnets.1.conv1", "mid_block.attentions.0.proj_in",
        *(f"up_blocks.{i}.resnets.{j}.conv1" for i in range(3) for j in range(3)),
        *(f"up_blocks.{i}.upsamplers.0.conv" for i in range(2)),
    ]  # fmt: skip
    assert Blocks.of(layers) == XL
    for layer in layers:
        part, number = re.match(r"lora_unet_(\w+?)_blocks?_(\d+)", authors_name(kohya_name(layer))).groups()  # type: ignore[union-attr]
        expected = {"input": int(number), "middle": 9, "output": 10 + int(number)}[part]
        assert XL.number(layer) == XL.number(kohya_name(layer).removeprefix("lora_unet_")) == expected, layer


def test_numbers_of_stable_diffusion_are_those_of_kohyas_block_lists() -> None:
    # kohya's list has 12 input blocks, the middle, 12 output blocks; a LoRA is on none of block 0.
    assert SD1.middle == 12
    assert SD1.number("down_blocks.3.resnets.1.conv2") == 11
    assert SD1.number("down_blocks.2.downsamplers.0.conv") == 9
    assert SD1.number("up_blocks.0.resnets.0.conv1") == 13
    assert SD1.number("up_blocks.3.attentions.2.proj_in") == 24
    assert SD1.number("time_embedding.linear_1") is None


def test_blocks_of_transformers_are_numbered_in_their_order() -> None:
    blocks = Blocks.of(
        [f"transformer_blocks.{i}." for i in range(5)] + [f"single_transformer_blocks.{i}." for i in range(20)]
    )
    assert blocks.number("transformer_blocks.4.attn.to_q") == 4
    assert blocks.number("single_transformer_blocks.0.attn.to_out") == 5
    assert Blocks.of(["layers.0."]).number("layers.17.attention.to_q") == 17


def test_a_pattern_leaves_text_encoders_alone_unless_it_names_them() -> None:
    first, second = "text_encoder.layers.0.mlp.fc1", "text_encoder_2.layers.0.mlp.fc1"
    assert not SD1.selects("*", first, "text_encoder") and not SD1.selects("0-24", first, "text_encoder")
    assert SD1.selects("text_encoder", first, "text_encoder") and SD1.selects("text_encoder", second, "text_encoder")
    assert SD1.selects("text_encoder_1", first, "text_encoder") and not SD1.selects("text_encoder_1", second, None)
    assert SD1.selects("text_encoder_2", second, None) and not SD1.selects("text_encoder_2", first, None)
    assert SD1.selects("text_encoder*.fc1", second, None)
