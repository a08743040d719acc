import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AnimateDiffPipeline,
    StableDiffusionPAGPipeline,
    StableDiffusionPipeline,
    UNetMotionModel,
)
from helpers.adapters import UNET_TARGETS, injected

from sdlora.errors import DataError
from sdlora.lora.inject import AdapterSpec
from sdlora.lora.timestep_rank import TimestepRank
from sdlora.lora_files.read import read_file
from sdlora.lora_files.timestep_ranks import apply_timestep_rank
from sdlora.lora_files.write import LoraMetadata, metadata_of_new_ranks, save_lora, write_file

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


@pytest.fixture
def masked_file(pipeline: Any, tmp_path: Path) -> Path:
    adapter = injected(pipeline, UNET_TARGETS, AdapterSpec(timestep_rank=SETTING), rank=4)
    adapter.remove()
    save_lora(tmp_path / "hero.safetensors", adapter.state(), metadata=replace(METADATA, timestep_rank=SETTING))
    # As if trained without: the same ranks everywhere, and other weights.
    other = {path: replace(w, down=w.down.flip(0) + 0.01) for path, w in adapter.state().items()}
    save_lora(tmp_path / "plain.safetensors", other, metadata=METADATA)
    return tmp_path / "hero.safetensors"


def test_fused_lora_is_refused_until_it_is_unfused(pipeline: Any, masked_file: Path) -> None:
    pipeline.load_lora_weights(masked_file)
    apply_timestep_rank(pipeline, masked_file)
    masked = output(pipeline, [900, 900, 900])
    pipeline.fuse_lora()
    with pytest.raises(DataError, match="unfuse_lora"):
        output(pipeline, [900, 900, 900])
    with pytest.raises(DataError, match="unfuse_lora"):
        apply_timestep_rank(pipeline, masked_file)
    pipeline.unfuse_lora()
    torch.testing.assert_close(output(pipeline, [900, 900, 900]), masked, atol=1e-5, rtol=1e-4)


def test_hot_swapped_lora_is_not_masked(pipeline: Any, tiny_base: Path, masked_file: Path) -> None:
    plain = masked_file.with_name("plain.safetensors")
    other = StableDiffusionPipeline.from_pretrained(tiny_base, safety_checker=None)
    other.load_lora_weights(plain)
    pipeline.load_lora_weights(masked_file, adapter_name="one")
    apply_timestep_rank(pipeline, masked_file, "one")
    output(pipeline, [900] * 3)
    pipeline.load_lora_weights(plain, adapter_name="one", hotswap=True)
    with pytest.warns(UserWarning, match="Another LoRA"):
        found = output(pipeline, [900] * 3)
    assert torch.equal(found, output(other, [900] * 3))


def test_padded_lora_masks_its_own_ranks(pipeline: Any, tiny_base: Path, tmp_path: Path) -> None:
    """Frozen initial factors are the second half of the file's ranks, not of the padded ones."""
    adapter = injected(pipeline, UNET_TARGETS, AdapterSpec(timestep_rank=SETTING, init="orthogonal"), rank=4)
    expected = output(pipeline, [20, 500, 900])
    file = tmp_path / "hero.safetensors"
    save_lora(file, adapter.state(), metadata=replace(METADATA, timestep_rank=SETTING))
    other = StableDiffusionPipeline.from_pretrained(tiny_base, safety_checker=None)
    other.enable_lora_hotswap(target_rank=16)
    other.load_lora_weights(file)
    apply_timestep_rank(other, file)
    torch.testing.assert_close(output(other, [20, 500, 900]), expected, atol=2e-5, rtol=1e-4)


def test_other_lora_than_the_files_is_refused(pipeline: Any, masked_file: Path) -> None:
    pipeline.load_lora_weights(masked_file.with_name("plain.safetensors"))
    with pytest.raises(DataError, match=r"is not hero\.safetensors"):
        apply_timestep_rank(pipeline, masked_file)


def test_resized_file_is_not_said_to_be_trained_without(pipeline: Any, masked_file: Path) -> None:
    source = read_file(masked_file)
    settings = {"sdlora.settings": json.dumps({"lora": {"timestep_rank_min": 2}})}
    metadata = metadata_of_new_ranks([replace(source, metadata=source.metadata | settings)])
    write_file(masked_file.with_name("small.safetensors"), source.state, metadata=metadata)
    with pytest.raises(DataError, match="resizing or merging"):
        apply_timestep_rank(pipeline, masked_file.with_name("small.safetensors"))


def test_perturbed_attention_guidance_predicts_as_without_it(pipeline: Any, masked_file: Path) -> None:
    """Its attention sees other batches than the UNet."""
    drawn = {}
    prompt = {"num_inference_steps": 2, "output_type": "latent", "height": 32, "width": 32, "guidance_scale": 5.0}
    pipeline.load_lora_weights(masked_file)
    apply_timestep_rank(pipeline, masked_file)
    for layers, scale in ((["mid"], 3.0), (["mid"], 1e-9)):
        pag = StableDiffusionPAGPipeline(
            **pipeline.components, requires_safety_checker=False, pag_applied_layers=layers
        )
        generator = torch.Generator().manual_seed(0)
        drawn[scale] = pag("a red ball", pag_scale=scale, generator=generator, **prompt).images
    own = pipeline("a red ball", generator=torch.Generator().manual_seed(0), **prompt).images
    torch.testing.assert_close(drawn[1e-9], own, atol=1e-4, rtol=1e-3)
    assert (drawn[3.0] - own).abs().max() > 1e-3


def test_animated_frames_are_masked_alike(pipeline: Any, masked_file: Path) -> None:
    motion = UNetMotionModel.from_unet2d(pipeline.unet)
    parts = {key: value for key, value in pipeline.components.items() if key not in ("unet", "safety_checker")}
    animated = AnimateDiffPipeline(**parts, unet=motion, motion_adapter=None)
    animated.load_lora_weights(masked_file)
    apply_timestep_rank(animated, masked_file)
    text = torch.randn(2, 77, 16, generator=torch.Generator().manual_seed(1))
    frames = torch.randn(2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        same = motion(frames, torch.tensor(900), text.repeat_interleave(3, 0), return_dict=False)[0]
        each = motion(frames, torch.tensor([900, 900]), text.repeat_interleave(3, 0), return_dict=False)[0]
        mixed = motion(frames, torch.tensor([900, 100]), text.repeat_interleave(3, 0), return_dict=False)[0]
    assert torch.equal(same, each)
    torch.testing.assert_close(mixed[0], same[0], atol=1e-5, rtol=1e-4)
    assert (mixed[1] - same[1]).abs().max() > 1e-3
