"""A transformer alone in one file: read in every layout, completed from a folder, and refused by name."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.bases import load, refused
from helpers.tiny import WHOLE_HEADS, WHOLE_HEADS_KLEIN, make_tiny_klein, make_tiny_z_image
from helpers.transformer_files import in_fp8, klein, weights_of, write, z_image

from sdlora.errors import ConfigError
from sdlora.estimate.meta_model import shapes_of_family, shapes_on_disk
from sdlora.models.architectures import Header
from sdlora.models.families import CLASSES, family_on_disk, identify_base
from sdlora.models.network_file import converter, diffusers_names, empty_network

PREFIXES = ["", "diffusion_model.", "model.diffusion_model."]
LAYOUTS = {"z-image": z_image, "flux2-klein-4b": klein, "flux2-klein-9b": klein}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("base") / "z-image"
    make_tiny_z_image(place, **WHOLE_HEADS)
    return place


@pytest.fixture(scope="module")
def file(folder: Path) -> Path:
    return write(folder.parent / "base.safetensors", z_image(weights_of(folder)))


def same(one: Any, other: Any) -> bool:
    theirs = other.state_dict()
    return one.state_dict().keys() == theirs.keys() and all(
        torch.equal(tensor, theirs[name]) for name, tensor in one.state_dict().items()
    )


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("layout", [z_image, dict], ids=["authors", "diffusers"])
def test_weights_are_those_of_the_folder(folder: Path, tmp_path: Path, prefix: str, layout: Any) -> None:
    file = write(tmp_path / "any.safetensors", layout(weights_of(folder)), prefix=prefix)
    assert family_on_disk(str(file)) == "z-image"
    whole, base = load(folder), load(file, components=str(folder))
    assert same(base.network, whole.network)
    assert (base.vae_identity, base.text_identity) == (whole.vae_identity, whole.text_identity)
    assert same(base.fresh_pipeline().transformer, whole.network)


def test_klein_is_read_in_both_layouts(tmp_path: Path) -> None:
    make_tiny_klein(tmp_path / "klein", **WHOLE_HEADS_KLEIN)
    state = weights_of(tmp_path / "klein")
    whole = load(tmp_path / "klein")
    for number, layout in enumerate((klein, dict)):
        file = write(tmp_path / f"{number}.safetensors", layout(state))
        assert family_on_disk(str(file)) == "flux2-klein-4b"
        assert same(load(file, components=str(tmp_path / "klein")).network, whole.network)


@pytest.mark.parametrize("options", [{}, {"by_row": True}, {"newer": True}], ids=["one scale", "by row", "newer names"])
def test_weights_in_8_bits_are_multiplied_by_their_scales(folder: Path, tmp_path: Path, options: Any) -> None:
    state = weights_of(folder)
    file = write(tmp_path / "fp8.safetensors", in_fp8(z_image(state), **options), prefix="model.diffusion_model.")
    network = load(file, components=str(folder)).network
    for name, tensor in network.state_dict().items():
        assert torch.allclose(tensor, state[name], rtol=2**-3.9, atol=2e-3), name
    # The scales of a row are its own: errors are those of three bits of mantissa.
    error = network.layers[0].attention.to_q.weight - state["layers.0.attention.to_q.weight"]
    assert 0 < error.norm() / state["layers.0.attention.to_q.weight"].norm() < 0.04


@pytest.mark.parametrize("family", LAYOUTS)
def test_key_map_is_complete_at_the_true_shape(family: Any) -> None:
    kind = CLASSES[family]
    config, _, _ = kind.true_configs()
    network = empty_network(kind.network_class, config)
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    authors = LAYOUTS[family]({name: torch.empty(shape, device="meta") for name, shape in expected.items()})
    header = Header({name: tuple(tensor.shape) for name, tensor in authors.items()}, {}, {}, {})
    found = identify_base(header, "x")
    assert found.family == family
    assert {name: found.architecture.unet[name] for name in config} == config
    converted = diffusers_names(converter(kind.network_class, config), authors, expected, "x")
    assert {name: tuple(tensor.shape) for name, tensor in converted.items()} == expected


def test_estimate_knows_its_shapes(file: Path) -> None:
    shapes = shapes_on_disk(file)
    assert (shapes.family, shapes.network["dim"]) == ("z-image", 128)
    assert shapes.text_bytes == shapes_of_family("z-image").text_bytes


def test_missing_parts_are_named(folder: Path, file: Path, tmp_path: Path) -> None:
    assert "base.components" in refused(file)
    assert "not found" in refused(file, components="nowhere")
    for part in ("text_encoder", "vae"):
        shutil.copytree(folder, tmp_path / part)
        shutil.rmtree(tmp_path / part / part)
        assert f"has no {part}" in refused(file, components=str(tmp_path / part))
    with pytest.raises(ConfigError, match="whole base model"):
        load(folder, components=str(folder))


def test_parts_of_others_are_refused(folder: Path, file: Path, tmp_path: Path, tiny_base: Path) -> None:
    make_tiny_klein(tmp_path / "klein")
    assert "Flux2KleinPipeline" in refused(file, components=str(tmp_path / "klein"))
    assert "StableDiffusionPipeline" in refused(file, components=str(tiny_base))
    # A VAE of other channels than the transformer's.
    narrow = tmp_path / "narrow"
    make_tiny_z_image(narrow, in_channels=8, **WHOLE_HEADS)
    (tmp_path / "n").mkdir()
    small = write(tmp_path / "n/base.safetensors", z_image(weights_of(narrow)))
    assert "takes 8 channels but its VAE has 16" in refused(small, components=str(folder))


def test_distilled_files_are_refused_by_name_or_metadata(folder: Path, tmp_path: Path) -> None:
    state = z_image(weights_of(folder))
    parts = str(folder)
    assert "distilled" in refused(write(tmp_path / "z_image_turbo_bf16.safetensors", state), components=parts)
    told = write(tmp_path / "other.safetensors", state, metadata={"modelspec.title": "Z-Image-Turbo"})
    assert "distilled" in refused(told, components=parts)
    for name in ("z-image-de-turbo.safetensors", "Z_Image_deturbo.safetensors"):
        load(write(tmp_path / name, state), components=parts)
    (tmp_path / "turbo").mkdir()
    load(write(tmp_path / "turbo" / "base.safetensors", state), components=parts)  # a folder's name says nothing
    make_tiny_klein(tmp_path / "klein", **WHOLE_HEADS_KLEIN)
    flux = klein(weights_of(tmp_path / "klein"))
    parts = str(tmp_path / "klein")
    assert "distilled" in refused(write(tmp_path / "flux-2-klein-4b-fp8.safetensors", flux), components=parts)
    load(write(tmp_path / "flux-2-klein-base-4b.safetensors", flux), components=parts)


def test_parts_may_come_from_the_distilled_model(folder: Path, file: Path, tmp_path: Path) -> None:
    turbo = tmp_path / "Z-Image-Turbo"
    shutil.copytree(folder, turbo)
    assert "distilled" in refused(turbo)
    assert same(load(file, components=str(turbo)).network, load(folder).network)


def test_other_formats_are_refused_by_name(folder: Path, tmp_path: Path) -> None:
    state, parts = z_image(weights_of(folder)), str(folder)

    def with_more(name: str, **tensors: torch.Tensor) -> str:
        return refused(
            write(tmp_path / name, state | {k.replace("__", "."): t for k, t in tensors.items()}), components=parts
        )

    (tmp_path / "z.gguf").write_bytes(b"GGUF" + bytes(100))
    assert "GGUF" in refused(tmp_path / "z.gguf", components=parts)
    one = torch.ones(2, 2)
    assert "nunchaku" in with_more("a.safetensors", layers__0__attention__to_out__0__qweight=one.to(torch.int8))
    assert "NVFP4" in with_more("b.safetensors", layers__0__attention__out__weight_scale_2=one)
    assert "bitsandbytes" in with_more("c.safetensors", layers__0__attention__out__weight__absmax=one)
    packed = dict(state) | {"layers.0.attention.out.weight": torch.zeros(128, 128, dtype=torch.int8)}
    assert "I8" in refused(write(tmp_path / "d.safetensors", packed), components=parts)
    blocks = in_fp8(state) | {"layers.0.attention.out.scale_weight": torch.ones(7)}
    assert "7 scales for 128 rows" in refused(write(tmp_path / "e.safetensors", blocks), components=parts)


def test_other_families_and_incomplete_files_are_refused(folder: Path, tmp_path: Path) -> None:
    state, parts = z_image(weights_of(folder)), str(folder)
    lumina = {name: tensor for name, tensor in state.items() if name != "cap_pad_token"}
    assert "Lumina 2" in refused(write(tmp_path / "a.safetensors", lumina), components=parts)
    one = torch.ones(2, 2)
    assert "Flux" in refused(write(tmp_path / "b.safetensors", {"double_blocks.0.img_attn.qkv.weight": one}))
    dev = {
        "double_stream_modulation_img.lin.weight": one,
        "guidance_in.in_layer.weight": one + 1,
        "double_blocks.0.x": one + 2,
    }
    assert "Flux" in refused(write(tmp_path / "c.safetensors", dev))
    short = {name: tensor for name, tensor in state.items() if "layers.1.feed_forward.w2" not in name}
    assert "lacks 'layers.1.feed_forward.w2.weight'" in refused(
        write(tmp_path / "d.safetensors", short), components=parts
    )
    more = state | {"siglip_embedder.0.weight": one}
    assert "siglip_embedder" in refused(write(tmp_path / "e.safetensors", more), components=parts)
    wide = state | {"layers.0.feed_forward.w1.weight": torch.ones(7, 128)}
    assert "has the shape (7, 128)" in refused(write(tmp_path / "f.safetensors", wide), components=parts)
