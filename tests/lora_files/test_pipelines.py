import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from helpers.adapters import UNET_TARGETS, injected

from sdlora.errors import DataError
from sdlora.lora.inject import AdapterSpec
from sdlora.lora.timestep_rank import TimestepRank
from sdlora.lora_files.pipelines import apply_timestep_rank
from sdlora.lora_files.write import LoraMetadata, save_lora

METADATA = LoraMetadata("hero", "base", "stable-diffusion-v1", 64, None, 1, 1, 1.7e9, {})
SETTING = TimestepRank(2, 1.0)


@pytest.fixture
def pipeline(tiny_base: Path) -> Any:
    return StableDiffusionPipeline.from_pretrained(tiny_base, safety_checker=None)


def output(pipeline: Any, timesteps: list[int]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    latents, text = torch.randn(3, 4, 8, 8, generator=generator), torch.randn(3, 77, 16, generator=generator)
    with torch.no_grad():
        found: torch.Tensor = pipeline.unet(latents, torch.tensor(timesteps), text, return_dict=False)[0]
    return found


@pytest.mark.parametrize("init", ["gaussian", "orthogonal"])
def test_pipeline_with_timestep_rank_predicts_as_in_training(
    pipeline: Any, tiny_base: Path, tmp_path: Path, init: Any
) -> None:
    targets = [*UNET_TARGETS, "text_encoder"]
    spec = AdapterSpec(timestep_rank=SETTING, init=init, target_ranks={"conv": 4})
    adapter = injected(pipeline, targets, spec, rank=8)
    cases = [[0, 500, 999], [999, 20, 340], [700]]
    expected = [output(pipeline, case) for case in cases]
    prompt = {"num_inference_steps": 3, "output_type": "latent", "height": 32, "width": 32}
    drawn = pipeline("a red ball", generator=torch.Generator().manual_seed(0), **prompt).images
    file = tmp_path / "hero.safetensors"
    save_lora(file, adapter.state(), metadata=replace(METADATA, timestep_rank=SETTING))

    other = StableDiffusionPipeline.from_pretrained(tiny_base, safety_checker=None)
    other.load_lora_weights(file)
    assert (output(other, cases[0]) - expected[0]).abs().max() > 1e-3
    apply_timestep_rank(other, file)
    for case, wanted in zip(cases, expected, strict=True):
        torch.testing.assert_close(output(other, case), wanted, atol=2e-5, rtol=1e-5)
    found = other("a red ball", generator=torch.Generator().manual_seed(0), **prompt).images
    torch.testing.assert_close(found, drawn, atol=1e-3, rtol=1e-3)
    print(json.dumps({"init": init, "difference": float((output(other, cases[0]) - expected[0]).abs().max())}))


def test_missing_or_plain_lora_is_refused(pipeline: Any, tmp_path: Path) -> None:
    adapter = injected(pipeline, ["cross_attention"], AdapterSpec(timestep_rank=SETTING), rank=4)
    adapter.remove()
    file, plain = tmp_path / "hero.safetensors", tmp_path / "plain.safetensors"
    save_lora(file, adapter.state(), metadata=replace(METADATA, timestep_rank=SETTING))
    save_lora(plain, adapter.state(), metadata=METADATA)
    with pytest.raises(DataError, match="load_lora_weights"):
        apply_timestep_rank(pipeline, file)
    pipeline.load_lora_weights(file, adapter_name="one")
    pipeline.load_lora_weights(plain, adapter_name="two")
    with pytest.raises(DataError, match="one, two"):
        apply_timestep_rank(pipeline, file)
    with pytest.raises(DataError, match=r"plain\.safetensors"):
        apply_timestep_rank(pipeline, plain, "one")
    with pytest.raises(DataError, match=r"none\.safetensors"):
        apply_timestep_rank(pipeline, tmp_path / "none.safetensors")
    apply_timestep_rank(pipeline, file, "one")
