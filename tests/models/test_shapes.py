"""The shapes of checkpoints in one file: true ones are exactly those that ship, others those that wrote them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from helpers.ldm import authors_layout
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from sdlora.common.families import Family
from sdlora.errors import BaseModelError
from sdlora.models.architectures import ARCHITECTURES, Architecture, Header, architecture_of
from sdlora.models.single_file import with_defaults

UNET = "model.diffusion_model."


def shapes_of(family: Family, architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """A checkpoint's shapes under its authors' names, from networks on the meta device."""
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
        return {name: tuple(tensor.shape) for name, tensor in authors_layout(family, networks).items()}


def derived(family: Family, shapes: Mapping[str, tuple[int, ...]]) -> Architecture:
    return architecture_of(Header(dict(shapes), {}, {}, {}), family, "base")


def whole(kind: type, config: Mapping[str, Any]) -> Any:
    """A configuration with the class's defaults, as JSON has it."""
    return json.loads(json.dumps(with_defaults(kind, dict(config))))


@pytest.mark.parametrize("family", list(ARCHITECTURES))
def test_true_shapes_are_exactly_the_configuration_that_ships(family: Family) -> None:
    shipped = ARCHITECTURES[family]
    assert derived(family, shapes_of(family, shipped)) == shipped


def test_openclips_last_layer_is_left_out() -> None:
    shapes = shapes_of("sd2", ARCHITECTURES["sd2"])
    prefix = "cond_stage_model.model.transformer.resblocks."
    last = {
        name.replace(f"{prefix}22.", f"{prefix}23."): s for name, s in shapes.items() if name.startswith(f"{prefix}22.")
    }
    assert derived("sd2", shapes | last).text_encoders == ARCHITECTURES["sd2"].text_encoders


# What their authors publish, in diffusers' layout: segmind/SSD-1B and segmind/Segmind-Vega.
VARIANTS: dict[str, dict[str, Any]] = {
    "SSD-1B": {
        "mid_block_type": "UNetMidBlock2D", "transformer_layers_per_block": [1, [2, 2], [4, 4]],
        "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1],
    },
    "Segmind-Vega": {
        "mid_block_type": "UNetMidBlock2D", "transformer_layers_per_block": [1, [1, 1], [2, 2]],
        "reverse_transformer_layers_per_block": [[2, 2, 2], [1, 1, 1], 1],
    },
    "one block a level": {"layers_per_block": 1, "transformer_layers_per_block": [1, 2, 5]},
    "narrow": {"block_out_channels": [64, 128, 320], "attention_head_dim": [1, 2, 5]},
    "no middle": {"layers_per_block": 1, "mid_block_type": None, "transformer_layers_per_block": [1, 2, 5]},
}  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_of_sdxl_have_the_weights_of_their_own_configuration(name: str) -> None:
    real = ARCHITECTURES["sdxl"]
    architecture = replace(real, unet={**real.unet, **VARIANTS[name]})
    shapes = shapes_of("sdxl", architecture)
    found = derived("sdxl", shapes)
    with torch.device("meta"):
        theirs, ours = (UNet2DConditionModel.from_config(one.unet) for one in (architecture, found))
        tensors = {key: torch.empty(shape) for key, shape in shapes.items()}
    wanted = {key: tensor.shape for key, tensor in theirs.state_dict().items()}
    assert {key: tensor.shape for key, tensor in ours.state_dict().items()} == wanted
    assert found.unet["attention_head_dim"] == architecture.unet["attention_head_dim"]
    # diffusers' own conversion puts every tensor where this configuration wants it.
    converted = convert_ldm_unet_checkpoint(tensors, config=dict(ours.config))
    assert {key: tensor.shape for key, tensor in converted.items()} == wanted


def test_smaller_text_encoders_and_vae_are_taken_as_they_are() -> None:
    real = ARCHITECTURES["sdxl"]
    smaller = {"hidden_size": 128, "num_attention_heads": 2, "intermediate_size": 96, "num_hidden_layers": 2}
    first = real.text_encoders[0] | smaller
    second = real.text_encoders[1] | smaller | {"hidden_size": 192, "num_attention_heads": 3, "projection_dim": 64}
    unet = {**real.unet, "cross_attention_dim": 320, "projection_class_embeddings_input_dim": 64 + 6 * 8}
    vae = {
        **real.vae, "block_out_channels": [32, 64], "layers_per_block": 1,
        "down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2,
    }  # fmt: skip
    unet["addition_time_embed_dim"] = 8
    found = derived("sdxl", shapes_of("sdxl", replace(real, unet=unet, vae=vae, text_encoders=(first, second))))
    assert found.text_encoders == (first, second)
    assert whole(AutoencoderKL, found.vae) == whole(AutoencoderKL, vae)
    assert whole(UNet2DConditionModel, found.unet) == whole(UNet2DConditionModel, unet)


@pytest.mark.parametrize(
    ("family", "change", "told"),
    [
        ("sdxl", {f"{UNET}middle_block.1.transformer_blocks.9.": None}, "middle has 9 .* last level 10"),
        ("sdxl", {f"{UNET}input_blocks.4.0.": None}, "lacks input_blocks.4.0.out_layers.3.weight"),
        ("sdxl", {f"{UNET}input_blocks.4.1.transformer_blocks.": None}, "only some blocks of a level"),
        ("sdxl", {f"{UNET}input_blocks.8.": None, f"{UNET}output_blocks.8.": None}, "levels have 2 and 2 and 1 blocks"),
        ("sdxl", {f"{UNET}output_blocks.8.": None}, "8 blocks going up, not 9"),
        ("sdxl", {f"{UNET}input_blocks.2.0.out_layers.3.weight": (352, 1)}, r"widths in one level \(320, 352\)"),
        ("sdxl", {f"{UNET}label_emb.0.0.weight": (1280, 2815)}, "takes 2815 numbers beside the text"),
        ("sdxl", {f"{UNET}input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": (640, 99)}, "text widths"),
        ("sd1", {f"{UNET}input_blocks.{n}.0.out_layers.3.weight": (330, 1) for n in (1, 2)}, "not multiples of 8"),
        ("sd1", {"cond_stage_model.transformer.text_model.embeddings.token_embedding.weight": (9, 64)}, "give 64"),
        ("sd2", {"cond_stage_model.model.transformer.resblocks.3.": None}, "lacks transformer.resblocks.3"),
        ("sdxl", {"conditioner.embedders.0.transformer.text_model.embeddings.token_embedding.weight": (9, 1280)},
         "two text encoders have the same width"),
        ("sd1", {"first_stage_model.encoder.down.0.block.0.": None},
         r"VAE lacks encoder\.down\.0\.block\.0\.conv1\.weight"),
    ],
)  # fmt: skip
def test_what_makes_no_network_of_the_family_is_named(
    family: Family, change: dict[str, tuple[int, ...] | None], told: str
) -> None:
    shapes = shapes_of(family, ARCHITECTURES[family])
    for prefix, shape in change.items():
        for name in [name for name in shapes if name.startswith(prefix)]:
            if shape is None:
                del shapes[name]
            else:
                shapes[name] = shape
    with pytest.raises(BaseModelError, match=told):
        derived(family, shapes)
