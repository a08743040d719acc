"""Checkpoints in one file at the families' true shapes, completed by the configurations that ship."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from helpers.bases import NAMES, Layouts, load, refused
from helpers.ldm import authors_layout, write_checkpoint
from helpers.tiny import TINY, tiny_networks
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from sdlora.common.families import Family
from sdlora.config.toml import parse_config
from sdlora.events import Exported, StepDone
from sdlora.models.architectures import ARCHITECTURES
from sdlora.run.run import start


def write_random_checkpoint(family: Family, file: Path) -> None:
    """A whole checkpoint in its authors' layout, its shapes from `ARCHITECTURES` alone, with random float16 weights."""
    architecture = ARCHITECTURES[family]
    kinds = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
    with torch.device("meta"):
        networks = {
            "unet": UNet2DConditionModel.from_config(architecture.unet),
            "vae": AutoencoderKL.from_config(architecture.vae),
            **{
                name: kind(CLIPTextConfig(**config))
                for (name, kind), config in zip(kinds.items(), architecture.text_encoders, strict=False)
            },
        }
        shapes = {name: tensor.shape for name, tensor in authors_layout(family, networks).items()}
    noise = (torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)) * 0.02).half()
    tensors = {}
    for name, shape in shapes.items():
        count = shape.numel()
        values = noise.repeat(-(-count // noise.numel()))[:count].reshape(shape)
        tensors[name] = 1 + values if len(shape) == 1 and name.endswith("weight") else values
    write_checkpoint(file, tensors, dtype=torch.float16)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "modules"), [("sd1", 64), ("sd2", 64), pytest.param("sdxl", 280, marks=pytest.mark.exhaustive)]
)
def test_checkpoint_of_true_shape_trains_to_a_verified_file(
    family: Family, modules: int, tmp_path: Path, images: Path
) -> None:
    file = tmp_path / f"{family}.safetensors"
    write_random_checkpoint(family, file)
    document = {
        "base": {"path": str(file), "prediction_type": "v_prediction" if family == "sd2" else "epsilon"},
        "data": {"folder": str(images), "resolution_px": 64, "validation_split": False},
        "train": {"epochs": 1, "batch_size": 5, "device": "cpu", "precision": "bf16"},
        "lora": {"rank": 2},
        "preview": {"enabled": False},
        "cache": {"dir": str(tmp_path / "cache")},
    }
    events = list(start(parse_config(document, name="hero"), tmp_path / "run"))
    assert all(event.loss == pytest.approx(event.loss) for event in events if isinstance(event, StepDone))
    (exported,) = [event for event in events if isinstance(event, Exported)]
    assert (exported.num_modules, exported.max_error) == (modules, 0.0)


@pytest.mark.parametrize(
    ("family", "dtype"),
    [("sd1", torch.float16), ("sd2", torch.bfloat16), ("sdxl", torch.float16)],
)
def test_single_file_has_the_weights_of_the_folder(
    family: Family, dtype: torch.dtype, tmp_path: Path, small: None
) -> None:
    networks = tiny_networks(family)
    file = tmp_path / "whatever.safetensors"
    write_checkpoint(file, authors_layout(family, networks), dtype=dtype)
    base = load(file, prediction_type="v_prediction" if family == "sd2" else None)
    assert (base.architecture, base.prediction_type) == NAMES[family]
    own = {"unet": base.network, "vae": base.vae} | dict(  # type: ignore[attr-defined]
        zip(("text_encoder", "text_encoder_2"), base.text_encoders, strict=False)
    )
    assert own.keys() == networks.keys()
    for name, network in networks.items():
        expected, found = network.state_dict(), own[name].state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key].to(dtype).float()) for key in expected)
    assert base.encode_captions(["a cat"])["states"].shape == (1, 77, TINY[family].text_width)
    with torch.no_grad():
        prompts = base.prompt_embeddings(["a cat"], [""])
    with base.pipeline() as pipeline, torch.no_grad():
        pipeline(**prompts, num_inference_steps=1, output_type="latent")


def test_checkpoint_with_old_clip_names_is_read(tmp_path: Path, layouts: Layouts, small: None) -> None:
    """As Stable Diffusion 1.x was saved before transformers 4, its text encoder's names have no text_model."""
    files = [tmp_path / "new.safetensors", tmp_path / "old.safetensors"]
    old = {key.replace(".transformer.text_model.", ".transformer."): tensor for key, tensor in layouts["sd1"].items()}
    ids = {"cond_stage_model.transformer.embeddings.position_ids": torch.arange(77)[None]}
    write_checkpoint(files[0], layouts["sd1"])
    write_checkpoint(files[1], old | ids)
    new_text, old_text = (load(file).encode_captions(["a cat"])["states"] for file in files)
    assert torch.equal(new_text, old_text)
    del old["cond_stage_model.transformer.final_layer_norm.bias"]
    write_checkpoint(files[1], old)
    assert "lacks a weight of its text encoder: final_layer_norm.bias" in refused(files[1])


@pytest.mark.parametrize(
    ("key", "told"),
    [
        ("first_stage_model.decoder.norm_out.bias", "a weight of its VAE: decoder.conv_norm_out.bias"),
        ("first_stage_model.decoder.up.2.upsample.conv.bias", "VAE: decoder.up.2.upsample.conv.bias"),
        (
            "first_stage_model.encoder.down.0.downsample.conv.bias",
            "VAE: encoder.down_blocks.0.downsamplers.0.conv.bias",
        ),
        ("model.diffusion_model.time_embed.0.weight", "UNet: time_embedding.linear_1.weight"),
        ("model.diffusion_model.output_blocks.2.1.conv.bias", "UNet: output_blocks.2.1.conv.bias"),
    ],
)
def test_checkpoint_that_lacks_a_weight_or_has_another_shape_is_refused_by_its_name(
    key: str, told: str, tmp_path: Path, layouts: Layouts, small: None
) -> None:
    file = tmp_path / "base.safetensors"
    write_checkpoint(file, {other: tensor for other, tensor in layouts["sd1"].items() if other != key})
    assert told in refused(file)
    write_checkpoint(file, layouts["sd1"] | {key: torch.zeros(3, *layouts["sd1"][key].shape[1:])})
    assert "(3," in refused(file)


def test_whatever_the_reader_of_a_folder_raises_is_told_in_words(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise AttributeError("'NoneType' object has no attribute 'to'")

    monkeypatch.setattr("diffusers.StableDiffusionPipeline.from_pretrained", broken)
    assert "could not be loaded" in refused(tiny_base)
