"""Options and fixtures that all tests share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image, ImageDraw
from transformers import CLIPTextConfig, CLIPTextModel

from sdlora.pocket.architecture import build_scheduler, build_tokenizer


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests that take minutes")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--slow"):
        return
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs --slow"))


def make_tiny_pipeline(folder: Path, *, prediction_type: str = "epsilon", in_channels: int = 4) -> None:
    """Write a Stable Diffusion 1.x of random weights and 32 px, in diffusers' layout."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer(folder / "tokenizer")
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=77, projection_dim=16, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=in_channels, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16, attention_head_dim=2,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 3, norm_num_groups=4,
        up_block_types=("UpDecoderBlock2D",) * 3, latent_channels=4, layers_per_block=1, sample_size=32,
    )  # fmt: skip
    pipeline = StableDiffusionPipeline(
        vae=vae, text_encoder=CLIPTextModel(text), tokenizer=tokenizer, unet=unet, safety_checker=None,
        scheduler=DDIMScheduler.from_config(build_scheduler().config, prediction_type=prediction_type),
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.save_pretrained(folder)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random base, in a folder."""
    folder = tmp_path_factory.mktemp("base") / "tiny"
    make_tiny_pipeline(folder)
    return folder


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five captioned pictures of 32 px, two of them wide."""
    folder = tmp_path_factory.mktemp("data") / "set"
    folder.mkdir()
    for index, color in enumerate(("red", "green", "blue", "orange", "purple")):
        picture = Image.new("RGB", (64, 32) if index > 2 else (32, 32), "white")
        ImageDraw.Draw(picture).ellipse((4 + index, 4, 24, 26), fill=color)
        picture.save(folder / f"{color}.png")
        (folder / f"{color}.txt").write_text(f"a {color} ball", encoding="utf-8")
    return folder


@pytest.fixture
def overrides(tiny_base: Path, pictures: Path, tmp_path: Path) -> list[str]:
    """Settings of a run that takes a second or two."""
    return [
        f"base.path={tiny_base}", f"data.folder={pictures}", f"cache.dir={tmp_path / 'cache'}",
        "data.resolution_px=32", "data.bucket_step_px=8", "preview.num_steps=2", 'preview.prompts=["a red ball"]',
        "train.device=cpu", "train.precision=fp32", "train.epochs=2", "train.batch_size=2", "lora.rank=4",
        "lora.alpha=4",
    ]  # fmt: skip
