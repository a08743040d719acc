"""What other programs make of a file, and files that PEFT itself loads."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from helpers.adapters import UNET_TARGETS, injected
from peft import PeftModel

from sdlora.errors import DataError, ExportError
from sdlora.lora.inject import AdapterSpec, LoraWeights
from sdlora.lora_files.elsewhere import check_same_weights, comfyui_modules, dora_elsewhere, write_peft_folders
from sdlora.lora_files.write import LoraMetadata, save_lora

METADATA = LoraMetadata("hero", "base", "stable-diffusion-v1", 64, None, 1, 1, 1.7e9, {})


def test_dora_by_each_programs_formula() -> None:
    layer = torch.nn.Linear(2, 2, bias=False)
    layer.weight.data = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    down, up = torch.tensor([[1.0, 0.0]]), torch.tensor([[-3.0], [0.0]])
    weights = LoraWeights(down, up, 1.0, magnitude=torch.tensor([8.0, 2.0]))
    # W + Delta is [[0, 4], [0, 2]], whose rows have the norms 4 and 2; those of W are 5 and 2.
    trained = torch.tensor([[0.0, 8.0], [0.0, 2.0]])
    comfyui = torch.tensor([[0.0, 4 * 8 / 5], [0.0, 2.0]])
    a1111 = torch.tensor([[0.0, 4 * 8 / 20**0.5], [0.0, 2 * 2 / 20**0.5]])
    changed = (trained - layer.weight).norm()
    found = dora_elsewhere({"unet": torch.nn.ModuleDict({"a": torch.nn.ModuleDict({"b": layer})})}, {"a.b": weights})
    assert found["ComfyUI"] == pytest.approx(float((comfyui - trained).norm() / changed), rel=1e-6)
    assert found["A1111"] != found["A1111"] or found["A1111"] == pytest.approx(
        float((a1111 - trained).norm() / changed), rel=1e-6
    )


def test_comfyui_applies_modules_outside_attention() -> None:
    block = "down_blocks.0.attentions.0.transformer_blocks.0"
    paths = [
        f"{block}.attn1.to_q",
        f"{block}.attn2.to_out.0",
        f"{block}.ff.net.2",
        "text_encoder.encoder.layers.0.mlp.fc1",
    ]
    assert comfyui_modules(paths) == 1
    assert comfyui_modules(["text_encoder.text_model.encoder.layers.0.mlp.fc1"]) == 1


@pytest.mark.parametrize("dora", [False, True])
def test_peft_loads_its_own_folders(pipeline: Any, tiny_base: Path, tmp_path: Path, dora: bool) -> None:
    spec = AdapterSpec(dora=dora, target_ranks={"conv": 2}, target_alphas={"conv": 5.0})
    adapter = injected(pipeline, [*UNET_TARGETS, "text_encoder"], spec)
    latents, text = torch.randn(1, 4, 8, 8), torch.randn(1, 77, 16)
    with torch.no_grad():
        expected = pipeline.unet(latents, torch.tensor(300), text, return_dict=False)[0]
        said = pipeline.text_encoder(torch.arange(77)[None]).last_hidden_state
    save_lora(tmp_path / "hero.safetensors", adapter.state(), metadata=METADATA, spelling="peft")
    folders = write_peft_folders(tmp_path / "hero.safetensors", tmp_path / "peft")
    assert folders == [tmp_path / "peft" / "unet", tmp_path / "peft" / "text_encoder"]
    fresh = StableDiffusionPipeline.from_pretrained(tiny_base, safety_checker=None)
    unet = PeftModel.from_pretrained(fresh.unet, tmp_path / "peft" / "unet")
    encoder = PeftModel.from_pretrained(fresh.text_encoder, tmp_path / "peft" / "text_encoder")
    with torch.no_grad():
        found = unet(latents, torch.tensor(300), text, return_dict=False)[0]
        heard = encoder(torch.arange(77)[None]).last_hidden_state
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(heard, said, atol=2e-5, rtol=1e-4)


def test_file_under_kohyas_names_has_no_folders(pipeline: Any, tmp_path: Path) -> None:
    adapter = injected(pipeline, ["cross_attention"], AdapterSpec())
    save_lora(tmp_path / "hero.safetensors", adapter.state(), metadata=METADATA)
    with pytest.raises(DataError, match="lora_adapter_metadata"):
        write_peft_folders(tmp_path / "hero.safetensors", tmp_path / "peft")


def test_other_weights_than_trained_are_no_proof(pipeline: Any, tmp_path: Path) -> None:
    adapter = injected(pipeline, ["cross_attention"], AdapterSpec(dora=True))
    state, file = adapter.state(), tmp_path / "hero.safetensors"
    save_lora(file, state, metadata=METADATA)
    check_same_weights(file, state, torch.float32, two_text_encoders=False)
    path, weights = next(iter(state.items()))
    assert weights.magnitude is not None
    for changed in (
        {**state, path: replace(weights, magnitude=weights.magnitude + 1e-6)},
        {**state, path: replace(weights, up=weights.up + 1e-6)},
        {**state, "mid_block.x": weights},
    ):
        with pytest.raises(ExportError):
            check_same_weights(file, changed, torch.float32, two_text_encoders=False)
    assert json.loads(json.dumps(comfyui_modules(state))) == 0
