"""The shapes, against the numbers of parameters that are known of the published models."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from helpers.bases import Layouts, load, refused
from helpers.ldm import Tensors, authors_layout, write_checkpoint
from helpers.tiny import tiny_networks
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from sdlora.common.families import Family
from sdlora.models.architectures import ARCHITECTURES, identify, read_header

NUM_VAE = 83_653_863
PUBLISHED: dict[Family, tuple[int, list[int]]] = {
    "sd1": (859_520_964, [123_060_480]),
    "sd2": (865_910_724, [340_387_840]),
    "sdxl": (2_567_463_684, [123_060_480, 694_659_840]),
}
UNET = "model.diffusion_model."


@pytest.mark.parametrize("family", list(ARCHITECTURES))
def test_every_network_has_as_many_parameters_as_the_published_one(family: Family) -> None:
    architecture = ARCHITECTURES[family]
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(architecture.unet)
        vae = AutoencoderKL.from_config(architecture.vae)
        text = [
            (CLIPTextModelWithProjection if index else CLIPTextModel)(CLIPTextConfig(**config))
            for index, config in enumerate(architecture.text_encoders)
        ]
    num_unet, num_text = PUBLISHED[family]
    assert sum(p.numel() for p in unet.parameters()) == num_unet
    assert sum(p.numel() for p in vae.parameters()) == NUM_VAE
    assert [sum(p.numel() for p in encoder.parameters()) for encoder in text] == num_text
    assert unet.config.cross_attention_dim == architecture.text_width


def test_other_kinds_of_files_are_named(tmp_path: Path) -> None:
    file = tmp_path / "sdxl-base.safetensors"  # the name tells nothing

    def found(*keys: str) -> str:
        save_file({key: torch.ones(1) for key in keys}, file)
        return refused(file)

    assert "is a LoRA" in found("lora_unet_down_blocks_0_x.alpha", "lora_te_x.alpha")
    assert "is a LoRA" in found("unet.down_blocks.0.attn1.to_q.lora_A.weight")
    assert "is Flux" in found("double_blocks.0.img_attn.proj.weight")
    assert "is Stable Diffusion 3" in found(f"{UNET}joint_blocks.0.x.weight")
    assert "Lumina 2" in found("model.diffusion_model.cap_embedder.1.weight")
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


def test_checkpoint_whose_norms_do_not_fit_is_refused(tmp_path: Path, layouts: Layouts) -> None:
    file = tmp_path / "base.safetensors"
    write_checkpoint(file, layouts["sd1"])
    assert "(16, 32) are not multiples of 32" in refused(file)


def test_checkpoint_without_some_layers_is_refused(tmp_path: Path, layouts: Layouts, small: None) -> None:
    file = tmp_path / "base.safetensors"
    write_checkpoint(file, without(layouts["sdxl"], f"{UNET}middle_block.1.transformer_blocks.1."))
    assert "middle has 1 transformer layers, its last level 2" in refused(file)
    write_checkpoint(file, without(layouts["sdxl"], "conditioner.embedders.1.model.ln_final."))
    assert re.search(r"lacks 2 weights of its text_encoder_2.*final_layer_norm|could not be loaded", refused(file))


def test_prediction_type_of_a_single_file_comes_from_its_header(tmp_path: Path, small: None) -> None:
    layouts = {family: authors_layout(family, tiny_networks(family)) for family in ("sd2", "sdxl")}
    file = tmp_path / "base.safetensors"

    def found(family: Family, metadata: dict[str, str] | None = None, **more: torch.Tensor) -> tuple[str | None, bool]:
        write_checkpoint(file, layouts[family] | more, metadata=metadata)
        identified = identify(read_header(file), "base")
        return identified.prediction_type, identified.zero_terminal_snr

    assert found("sd2") == (None, False)
    assert found("sd2", {"modelspec.architecture": "stable-diffusion-v2-768-v"}) == ("v_prediction", False)
    assert found("sd2", {"modelspec.architecture": "stable-diffusion-v2-512"}) == ("epsilon", False)
    assert found("sd2", {"modelspec.prediction_type": "epsilon"}) == ("epsilon", False)
    # 64 latents of 4 px each here, of 8 px each at the true shapes.
    assert load(file).resolution_px == 256
    assert found("sdxl") == ("epsilon", False)
    assert found("sdxl", v_pred=torch.zeros(1)) == ("v_prediction", False)
    assert found("sdxl", v_pred=torch.zeros(1), ztsnr=torch.zeros(1)) == ("v_prediction", True)
    base = load(file)
    assert (base.prediction_type, float(base.levels.alphas_cumprod[-1])) == ("v_prediction", 0.0)
    assert load(file, prediction_type="epsilon").prediction_type == "epsilon"
