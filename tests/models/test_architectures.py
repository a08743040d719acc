"""The shapes, against the numbers of parameters that are known of the published models."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from sdlora.models.architectures import ARCHITECTURES, Family

NUM_VAE = 83_653_863
PUBLISHED: dict[Family, tuple[int, list[int]]] = {
    "sd1": (859_520_964, [123_060_480]),
    "sd2": (865_910_724, [340_387_840]),
    "sdxl": (2_567_463_684, [123_060_480, 694_659_840]),
}


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
