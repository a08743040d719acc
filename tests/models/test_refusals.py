"""What cannot be trained is refused with a reason of its own, and before any weights are read."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import EDMEulerScheduler
from helpers.bases import refused
from helpers.tiny import make_tiny, make_tiny_pipeline
from safetensors.torch import save_file


def test_folder_that_is_not_a_base_is_refused(tmp_path: Path, tiny_base: Path) -> None:
    assert "'nowhere' was not found" in refused("nowhere")
    copy = tmp_path / "copy"
    shutil.copytree(tiny_base, copy)
    index = json.loads((copy / "model_index.json").read_text())

    def as_kind(kind: str) -> str:
        (copy / "model_index.json").write_text(json.dumps({**index, "_class_name": kind}))
        return refused(copy)

    assert "is a FluxPipeline" in as_kind("FluxPipeline")
    assert "is a StableDiffusion3Pipeline" in as_kind("StableDiffusion3Pipeline")
    assert "an inpainting model" in as_kind("StableDiffusionInpaintPipeline")
    assert "a depth model" in as_kind("StableDiffusionDepth2ImgPipeline")
    assert "edits images" in as_kind("StableDiffusionInstructPix2PixPipeline")
    assert "the refiner" in as_kind("StableDiffusionXLImg2ImgPipeline")
    (copy / "model_index.json").write_text("{")
    assert "not valid JSON" in refused(copy)
    (copy / "model_index.json").unlink()
    assert "model_index.json" in refused(copy)
    save_file({"unet.x.lora_A.weight": torch.ones(1)}, copy / "pytorch_lora_weights.safetensors")
    assert "it is a LoRA" in refused(copy)


def test_incomplete_folder_is_refused(tmp_path: Path, tiny_base: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_base, copy)
    weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1000])
    assert re.search(r"diffusion_pytorch_model.safetensors is truncated: it has [\d,]+ bytes of", refused(copy))
    weights.unlink()
    assert "could not be loaded" in refused(copy)
    weights.write_bytes(whole)
    shutil.rmtree(copy / "text_encoder")
    assert "has no text_encoder" in refused(copy)


@pytest.mark.parametrize(("channels", "reason"), [(9, "an inpainting model"), (5, "a depth"), (8, "edits images")])
def test_unet_with_other_inputs_is_refused(tmp_path: Path, channels: int, reason: str) -> None:
    make_tiny_pipeline(tmp_path / "base", in_channels=channels)
    assert reason in refused(tmp_path / "base")


def test_other_noise_schedule_is_refused(tmp_path: Path, tiny_base: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_base, copy)
    EDMEulerScheduler().save_pretrained(copy / "scheduler")
    index = json.loads((copy / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "EDMEulerScheduler"]
    (copy / "model_index.json").write_text(json.dumps(index))
    assert "EDMEulerScheduler" in refused(copy)


def test_refiner_in_a_base_folder_is_refused(tmp_path: Path) -> None:
    # The refiner has five sizes instead of six.
    make_tiny("sdxl", tmp_path / "refiner", projection_class_embeddings_input_dim=24 + 5 * 8)
    assert "refiner of Stable Diffusion XL" in refused(tmp_path / "refiner")
