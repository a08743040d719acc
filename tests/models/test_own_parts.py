"""Text encoder and VAE in files of their own, in the place of a base model's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from helpers.bases import CAPTIONS, load, refused
from helpers.ldm import vae_layout
from helpers.tiny import WHOLE_HEADS, WHOLE_HEADS_KLEIN, make_tiny_klein, make_tiny_z_image
from helpers.transformer_files import in_fp8, klein, weights_of, write, z_image
from safetensors.torch import load_file

from sdlora.errors import ConfigError


def vae_file(folder: Path, file: Path, *, prefix: str = "", inside: bool = False) -> Path:
    """A folder's VAE in its authors' layout; `inside` the coder and the decoder lie the convolutions beside them."""
    config = json.loads((folder / "vae" / "config.json").read_text(encoding="utf-8"))
    state = load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")
    state = vae_layout(state, len(config["up_block_types"]))
    if inside:
        state = {
            key if (part := key.partition("quant_conv.")[0]) not in ("", "post_") else
            f"{'decoder' if part else 'encoder'}.{key}": tensor
            for key, tensor in state.items()
        }  # fmt: skip
    return write(file, state, prefix=prefix)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("base") / "z-image"
    make_tiny_z_image(place, **WHOLE_HEADS)
    return place


def test_text_encoder_and_vae_come_from_files(folder: Path, tmp_path: Path) -> None:
    whole, place = load(folder), tmp_path / "parts"
    transformer = write(tmp_path / "z.safetensors", z_image(weights_of(folder)))
    text = write(
        tmp_path / "qwen.safetensors", load_file(folder / "text_encoder" / "model.safetensors"), prefix="model."
    )
    vae = vae_file(folder, tmp_path / "ae.safetensors")
    # What is left of the folder: its index, tokenizer and scheduler, and the configurations of tiny parts.
    shutil.copytree(folder, place, ignore=shutil.ignore_patterns("*.safetensors"))
    base = load(transformer, components=str(place), text_encoder=str(text), vae=str(vae))
    assert (base.vae_identity, base.text_identity) == (whole.vae_identity, whole.text_identity)
    for one, other in zip(
        base.encode_captions(CAPTIONS).values(), whole.encode_captions(CAPTIONS).values(), strict=True
    ):
        assert torch.equal(one, other)
    assert base.fresh_pipeline().vae.config.scaling_factor == 0.36
    assert "has no vae" in refused(transformer, components=str(place), text_encoder=str(text))


def test_klein_reads_its_encoder_in_bfloat16_and_a_vae_with_statistics(tmp_path: Path) -> None:
    folder = tmp_path / "klein"
    make_tiny_klein(folder, **WHOLE_HEADS_KLEIN)
    transformer = write(tmp_path / "k.safetensors", klein(weights_of(folder)))
    state = load_file(folder / "text_encoder" / "model.safetensors")
    text = write(tmp_path / "qwen.safetensors", in_fp8({name: tensor.float() for name, tensor in state.items()}))
    vae = vae_file(folder, tmp_path / "flux2.safetensors", inside=True)
    whole = load(folder)
    base = load(transformer, components=str(folder), text_encoder=str(text), vae=str(vae))
    assert base.vae_identity == whole.vae_identity
    assert next(base.text_encoders[0].parameters()).dtype == torch.bfloat16
    (ours,), (theirs,) = (list(one.encode_captions(CAPTIONS[:1]).values())[:1] for one in (base, whole))
    assert 0 < (ours.float() - theirs).norm() / theirs.norm() < 0.2


@pytest.mark.parametrize("form", ["file", "folder"])
def test_vae_replaces_that_of_any_base_model(tiny_base: Path, tmp_path: Path, form: str) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_base, other)
    torch.manual_seed(7)
    AutoencoderKL.from_config(AutoencoderKL.load_config(other / "vae")).save_pretrained(other / "vae")
    vae = vae_file(other, tmp_path / "v.safetensors", prefix="first_stage_model.") if form == "file" else other / "vae"
    plain, own, base = load(tiny_base), load(other), load(tiny_base, vae=str(vae))
    assert base.vae_identity == own.vae_identity != plain.vae_identity
    assert torch.equal(base.network.conv_in.weight, plain.network.conv_in.weight)
    assert all(parameter.dtype == torch.float32 for parameter in base.vae.parameters())
    assert torch.equal(base.fresh_pipeline().vae.decoder.conv_in.weight, own.vae.decoder.conv_in.weight)


def test_what_is_no_such_part_is_refused(folder: Path, tiny_base: Path, tmp_path: Path) -> None:
    assert "base.vae = 'nowhere' was not found" in refused(tiny_base, vae="nowhere")
    assert "lacks" in refused(tiny_base, vae=str(write(tmp_path / "a.safetensors", {"x": torch.zeros(1)})))
    # A VAE of sixteen channels, which has fewer layers, for a base of four.
    assert "lacks 'post_quant_conv.bias'" in refused(tiny_base, vae=str(vae_file(folder, tmp_path / "ae.safetensors")))
    assert "could not be loaded" in refused(tiny_base, vae=str(folder))
    (tmp_path / "v.gguf").write_bytes(b"GGUF1234")
    assert "GGUF" in refused(tiny_base, vae=str(tmp_path / "v.gguf"))
    transformer = write(tmp_path / "z.safetensors", z_image(weights_of(folder)))
    found = refused(transformer, components=str(folder), text_encoder="nowhere.safetensors")
    assert "base.text_encoder = 'nowhere.safetensors' was not found" in found
    with pytest.raises(ConfigError, match="whole base model"):
        load(tiny_base, text_encoder="x.safetensors")
