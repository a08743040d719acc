"""What cannot be trained is refused with a reason of its own, and before any weights are read."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import EDMEulerScheduler
from helpers.ldm import Tensors, authors_layout, write_checkpoint
from helpers.tiny import TINY, make_tiny, make_tiny_pipeline, tiny_networks
from safetensors.torch import load_file, save_file

from sdlora.errors import BaseModelError
from sdlora.models.architectures import ARCHITECTURES, Family
from sdlora.models.load import load_base

UNET = "model.diffusion_model."
Layouts = dict[Family, Tensors]


def refused(path: Path | str, **options: Any) -> str:
    with pytest.raises(BaseModelError) as caught:
        load_base(str(path), device=torch.device("cpu"), dtype=torch.float32, **options)
    return str(caught.value)


# --- Folders ----------------------------------------------------------------------------------------------------------


def test_a_folder_that_is_no_base(tmp_path: Path, tiny_base: Path) -> None:
    assert "There is no base 'nowhere'" in refused("nowhere")
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


# --- Checkpoints in one file ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def layouts() -> Layouts:
    return {family: authors_layout(family, tiny_networks(family)) for family in ARCHITECTURES}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for family, architecture in TINY.items():
        monkeypatch.setitem(ARCHITECTURES, family, architecture)


@pytest.mark.parametrize("ending", [".ckpt", ".pt", ".bin", ".pth"])
def test_pickled_checkpoint_is_refused(tmp_path: Path, ending: str) -> None:
    (tmp_path / f"model{ending}").write_bytes(b"x")
    reason = refused(tmp_path / f"model{ending}")
    assert "pickled checkpoint" in reason
    assert "torch.load(FILE, weights_only=True)" in reason


def test_truncated_or_foreign_file_is_refused(tmp_path: Path, layouts: Layouts, small: None) -> None:
    file = tmp_path / "base.safetensors"
    write_checkpoint(file, layouts["sd1"])
    whole = file.read_bytes()
    for length in (len(whole) - 1, len(whole) // 2, 1000):
        file.write_bytes(whole[:length])
        assert "base.safetensors is truncated" in refused(file)
    for content in (b"", b"PK\x03\x04" * 9, (20).to_bytes(8, "little") + b"{" * 20, b"\x80\x04pickle" * 3):
        file.write_bytes(content)
        assert "not a safetensors file" in refused(file)


def test_other_kinds_of_files_are_named(tmp_path: Path) -> None:
    file = tmp_path / "sdxl-base.safetensors"  # the name tells nothing

    def found(*keys: str) -> str:
        save_file({key: torch.ones(1) for key in keys}, file)
        return refused(file)

    assert "is a LoRA" in found("lora_unet_down_blocks_0_x.alpha", "lora_te_x.alpha")
    assert "is a LoRA" in found("unet.down_blocks.0.attn1.to_q.lora_A.weight")
    assert "is Flux" in found("double_blocks.0.img_attn.proj.weight")
    assert "is Stable Diffusion 3" in found(f"{UNET}joint_blocks.0.x.weight")
    assert "is a ControlNet" in found("control_model.input_blocks.0.0.weight")
    assert "is a textual inversion" in found("emb_params")
    assert "is a UNet alone" in found("down_blocks.0.resnets.0.conv1.weight")
    assert "is a VAE alone" in found("encoder.down.0.block.0.conv1.weight")
    assert "is a text encoder alone" in found("text_model.embeddings.token_embedding.weight")
    assert "an unknown kind of file" in found("something")


def without(tensors: Tensors, beginning: str) -> Tensors:
    return {key: tensor for key, tensor in tensors.items() if not key.startswith(beginning)}


def test_unsupported_checkpoint_is_refused_with_the_reason(tmp_path: Path, layouts: Layouts, small: None) -> None:
    file = tmp_path / "base.safetensors"

    def found(tensors: Tensors) -> str:
        write_checkpoint(file, tensors)
        return refused(file)

    sd1, sd2, sdxl = (layouts[family] for family in ("sd1", "sd2", "sdxl"))
    for channels, reason in ((9, "an inpainting check"), (5, "a depth check"), (8, "an image-editing check")):
        wide = {f"{UNET}input_blocks.0.0.weight": torch.zeros(16, channels, 3, 3)}
        assert reason in found(sd1 | wide)
        assert reason in found(sdxl | wide)
    refiner = without(sdxl, "conditioner.") | {"conditioner.embedders.0.model.ln_final.weight": torch.ones(2)}
    assert "refiner of Stable Diffusion XL" in found(refiner)
    assert "refiner of Stable Diffusion XL" in found(sdxl | {f"{UNET}label_emb.0.0.weight": torch.zeros(64, 2560)})
    assert "unCLIP" in found(sd2 | {f"{UNET}label_emb.0.0.weight": torch.zeros(64, 8)})
    assert "without its text encoder (no cond_stage_model.transformer." in found(without(sd1, "cond_stage_model."))
    assert "without its text encoder (no cond_stage_model.model." in found(without(sd2, "cond_stage_model."))
    assert "without its text encoders (no conditioner.embedders.0" in found(without(sdxl, "conditioner."))
    one = without(sdxl, "conditioner.embedders.1.")
    assert "without its text encoders (no conditioner.embedders.1.model." in found(one)
    assert "without its VAE" in found(without(sd1, "first_stage_model."))
    assert "EDM" in found(sdxl | {"edm_mean": torch.zeros(4)})
    assert "base.prediction_type" in found(sd2)


def test_checkpoint_of_another_size_is_refused(tmp_path: Path, layouts: Layouts) -> None:
    file = tmp_path / "base.safetensors"
    write_checkpoint(file, layouts["sd1"])
    assert "(widths 16 and 16, not 320 and 768)" in refused(file)


def test_checkpoint_without_some_layers_is_refused(tmp_path: Path, layouts: Layouts, small: None) -> None:
    file = tmp_path / "base.safetensors"
    for lost in (f"{UNET}middle_block.1.transformer_blocks.1.", "conditioner.embedders.1.model.ln_final."):
        write_checkpoint(file, without(layouts["sdxl"], lost))
        assert "could not be loaded" in (reason := refused(file)) or "lacks" in reason
    assert load_file(file)
