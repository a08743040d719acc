import json
from typing import Any

import pytest
import torch
from helpers.adapters import UNET_TARGETS, injected
from helpers.readers import unet_names

from sdlora.common.families import Family
from sdlora.lora.inject import TARGETS, AdapterSpec, LoraState, LoraWeights, adaptable, target_of
from sdlora.lora_files.names import (
    authors_name,
    diffusers_name,
    kohya_name,
    kohya_target,
    portable_state,
    to_kohya,
    to_peft,
)


def update(weights: LoraWeights) -> torch.Tensor:
    """The update that weights stand for, written out in float64, (o, i k k)."""

    def product(down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return up.double().flatten(1) @ down.double().flatten(1)

    whole = product(weights.down, weights.up)
    if weights.initial is not None:
        whole = whole - product(*weights.initial)
    return whole * weights.alpha / weights.down.shape[0]


SPECS = [
    AdapterSpec(init="pissa", target_ranks={"mlp": 3}),
    AdapterSpec(target_alphas={"conv": 5.0, "text_encoder": 7.0}, target_ranks={"mlp": 3}, rslora=True),
    AdapterSpec(init="orthogonal", target_alphas={"self_attention": 3.0}),
]


@pytest.mark.parametrize("spec", SPECS)
def test_portable_state_has_the_same_update_and_one_alpha_per_network(pipeline: Any, spec: AdapterSpec) -> None:
    state = injected(pipeline, [*UNET_TARGETS, "text_encoder"], spec).state()
    written = portable_state(state)
    for path, weights in state.items():
        torch.testing.assert_close(update(written[path]), update(weights), atol=1e-6, rtol=1e-5)
        assert written[path].down.shape[0] == weights.down.shape[0] * (1 if weights.initial is None else 2)
    for text in (True, False):
        assert len({w.alpha for path, w in written.items() if path.startswith("text_encoder.") == text}) == 1


def test_kohya_name_of_unet_and_text_encoder_paths() -> None:
    assert kohya_name("down_blocks.0.resnets.1.conv_shortcut") == "lora_unet_down_blocks_0_resnets_1_conv_shortcut"
    expected = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    assert kohya_name("text_encoder.encoder.layers.0.self_attn.q_proj") == expected
    assert kohya_name("text_encoder.text_model.encoder.layers.0.self_attn.q_proj") == expected


def test_target_of_a_kohya_name_is_that_of_its_path(pipeline: Any) -> None:
    layers = adaptable(pipeline.unet, [pipeline.text_encoder])
    found = {path: kohya_target(kohya_name(path)) for path in layers}
    assert found == {path: target_of(path) for path in layers}
    assert set(found.values()) == {*TARGETS, None} - {"attention"}  # of transformers
    second = "text_encoder_2.encoder.layers.3.mlp.fc1"
    assert kohya_target(kohya_name(second, two_text_encoders=True)) == target_of(second) == "text_encoder"


def test_convolution_tensors_have_locon_shapes(pipeline: Any) -> None:
    tensors = to_kohya(injected(pipeline, ["conv"], AdapterSpec()).state())
    name = "lora_unet_down_blocks_0_downsamplers_0_conv"
    assert tensors[f"{name}.lora_down.weight"].shape == (4, 16, 3, 3)
    assert tensors[f"{name}.lora_up.weight"].shape == (16, 4, 1, 1)


def one_module() -> LoraState:
    return {"conv1": LoraWeights(torch.ones(2, 3), torch.ones(4, 2), 3.0, torch.ones(4))}


def test_peft_metadata_has_only_keys_that_diffusers_accepts() -> None:
    _, metadata = to_peft(one_module())
    assert json.loads(metadata) == {
        "unet.r": 2, "unet.lora_alpha": 3.0, "unet.target_modules": ["conv1"], "unet.use_dora": True,
        "unet.rank_pattern": {},
    }  # fmt: skip


def test_two_text_encoders_have_different_names() -> None:
    first = kohya_name("text_encoder.encoder.layers.0.mlp.fc1", two_text_encoders=True)
    assert first == "lora_te1_text_model_encoder_layers_0_mlp_fc1"
    assert kohya_name("text_encoder_2.text_model.encoder.layers.0.mlp.fc1") == first.replace("te1", "te2")
    assert kohya_name("text_encoder_2.text_projection") == "lora_te2_text_projection"


SINGLE = {
    "input_blocks_0_0": "conv_in", "out_2": "conv_out", "time_embed_0": "time_embedding_linear_1",
    "time_embed_2": "time_embedding_linear_2", "label_emb_0_0": "add_embedding_linear_1",
    "label_emb_0_2": "add_embedding_linear_2",
}  # fmt: skip


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_every_layer_converts_between_both_names(family: Family) -> None:
    names = unet_names(family) | SINGLE
    assert {diffusers_name(f"lora_unet_{authors}") for authors in names} == {f"lora_unet_{n}" for n in names.values()}
    for authors, diffusers in names.items():
        assert diffusers_name(f"lora_unet_{authors}") == f"lora_unet_{diffusers}"
        if family == "sdxl":
            assert authors_name(f"lora_unet_{diffusers}") == f"lora_unet_{authors}"


@pytest.mark.parametrize("name", ["lora_te1_text_model_encoder_layers_0_mlp_fc1", "lora_unet_mid_block", "x"])
def test_other_names_are_unchanged(name: str) -> None:
    assert diffusers_name(name) == authors_name(name) == name
