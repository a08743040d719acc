"""Layers and weights of bases on the disk; merging into single files, against diffusers' own fusing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from helpers.adapters import UNET_TARGETS, perturb
from helpers.bases import load
from helpers.command import call
from helpers.ldm import Tensors, authors_layout, write_checkpoint
from helpers.tiny import TINY, tiny_networks
from helpers.trainers import kohya_trainer
from interop import on_meta
from safetensors.torch import load_file, save_file
from torch import nn

from sdlora.common.families import Family
from sdlora.errors import BaseModelError, DataError, OutputError
from sdlora.lora.inject import LoraState, LoraWeights, adaptable, find_targets, inject
from sdlora.lora_files.algebra import update
from sdlora.lora_files.base_weights import base_weights, empty_networks, file_weights, layers_by_name, paths_for
from sdlora.lora_files.merge import differences, merge_into
from sdlora.lora_files.read import read_file
from sdlora.lora_files.write import LoraMetadata, save_lora
from sdlora.models.architectures import ARCHITECTURES, Header
from sdlora.models.unet import clip_tokenizer

FAMILIES: list[Family] = ["sd1", "sd2", "sdxl"]
SPEC = {"sd1": "stable-diffusion-v1", "sd2": "stable-diffusion-v2-768-v", "sdxl": "stable-diffusion-xl-v1-base"}
METADATA = {"modelspec.title": "a base", "modelspec.architecture": "told", "zz": "é"}
# Linear and convolution layers at true shapes: those of the targets, and conv_in, conv_out, the embeddings' and SDXL's
# projection of the pooled text.
NUM_LAYERS = {"sd1": 328 + 22 + 4, "sd2": 394 + 22 + 4, "sdxl": 1035 + 17 + 6 + 1}
# Tensors of the UNet and the text encoders in diffusers' own state dicts.
NUM_WEIGHTS = {"sd1": 686 + 196, "sd2": 686 + 372, "sdxl": 1680 + 196 + 517}


def networks_of(pipeline: Any) -> dict[str, Any]:
    names = ("unet", "text_encoder", "text_encoder_2")
    return {name: getattr(pipeline, name) for name in names if getattr(pipeline, name, None) is not None}


def header_of(tensors: Tensors) -> Header:
    return Header({key: tuple(t.shape) for key, t in tensors.items()}, {}, dict.fromkeys(tensors, "F32"), {})


@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_at_true_shapes_has_exactly_one_place(family: Family) -> None:
    """Counted against diffusers' networks, and against the reverse of the layout, written by hand in the tests."""
    unet, text = on_meta(ARCHITECTURES[family])
    networks = dict(zip(("unet", "text_encoder", "text_encoder_2"), (unet, *text), strict=False))
    with torch.device("meta"):
        vae = diffusers.AutoencoderKL.from_config(ARCHITECTURES[family].vae)
    tensors = authors_layout(family, {**networks, "vae": vae})
    found = file_weights(Path("base.safetensors"), header_of(tensors), family, ARCHITECTURES[family])
    expected = {
        f"{name}.{key.removeprefix('text_model.')}": tuple(tensor.shape)
        for name, network in networks.items()
        for key, tensor in network.state_dict().items()
    }
    assert {name: place.shape for name, (place,) in found.places.items()} == expected
    assert len(expected) == NUM_WEIGHTS[family]
    assert len(found.layers) == sum(len(adaptable(network)) for network in networks.values()) == NUM_LAYERS[family]
    # Every row of every tensor of these networks is exactly one weight's.
    rows: dict[str, list[tuple[int, int]]] = {}
    for (place,) in found.places.values():
        rows.setdefault(place.key, []).extend(place.pieces or [(0, tensors[place.key].shape[0])])
    for key, spans in rows.items():
        stops = [0, *(stop for _, stop in sorted(spans))]
        assert [start for start, _ in sorted(spans)] == stops[:-1]
        assert stops[-1] == tensors[key].shape[0]
    unused = {key for key in tensors if not key.startswith("first_stage_model.")} - set(rows)
    assert unused == ({"cond_stage_model.model.text_projection"} if family == "sd2" else set())


@pytest.fixture
def checkpoint(tmp_path: Path, small: None) -> Any:
    """Writes a family's single-file checkpoint."""

    def write(family: Family, dtype: torch.dtype = torch.float32, **more: torch.Tensor) -> Path:
        tensors = authors_layout(family, tiny_networks(family))
        # What such files hold beside the networks, in an order that is not the alphabet's.
        more = {"model_ema.decay": torch.tensor(0.5), "alphas_cumprod": torch.rand(4), **more}
        if family == "sd1":
            more["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
        file = tmp_path / f"{family}.safetensors"
        halved = {key: tensor.to(dtype) for key, tensor in reversed(tensors.items())}
        save_file({k: t.contiguous() for k, t in (halved | more).items()}, file, metadata=METADATA)
        return file

    return write


def loaded(family: Family, file: Path) -> Any:
    return load(file, prediction_type=TINY[family].scheduler["prediction_type"]).fresh_pipeline()


def lora_for(family: Family, pipeline: Any, file: Path) -> Path:
    """A LoRA on all targets of a pipeline."""
    unet, *text = networks_of(pipeline).values()
    targets = find_targets(unet, [*UNET_TARGETS, "text_encoder"], text)
    adapter = inject(unet, targets, 4, 2.0, seed=1, text_encoders=text)
    perturb(adapter)
    adapter.remove()
    save_lora(file, adapter.state(), metadata=LoraMetadata("hero", "base", SPEC[family], 64, None, 1, 1, 1.7e9, {}))
    return file


def own_pipeline(family: Family, dtype: torch.dtype) -> Any:
    """The checkpoint's networks in diffusers' pipeline, without ever having been in one file."""
    parts = {name: network.to(dtype).float() for name, network in tiny_networks(family).items()}
    tokenizers = {"tokenizer": clip_tokenizer("!")} | ({"tokenizer_2": clip_tokenizer("!")} if family == "sdxl" else {})
    more = {"add_watermarker": False} if family == "sdxl" else {"safety_checker": None, "feature_extractor": None}
    kind = getattr(diffusers, TINY[family].pipeline)
    return kind(**parts, **tokenizers, **more, scheduler=diffusers.DDIMScheduler())


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    code, out, err = call(capsys, *map(str, arguments))
    assert code == 0, err
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_merged_file_equals_diffusers_fuse_lora(
    family: Family, dtype: torch.dtype, checkpoint: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, merged = checkpoint(family, dtype), tmp_path / "merged.safetensors"
    reference = own_pipeline(family, dtype)
    hero = lora_for(family, reference, tmp_path / "hero.safetensors")
    plain = {name: _copied(network) for name, network in networks_of(reference).items()}
    run(capsys, "merge", hero, "--weights", "0.8", "--into", base, "--output", merged)
    reference.load_lora_weights(hero.parent, weight_name=hero.name)
    reference.fuse_lora(lora_scale=0.8)
    reference.unload_lora_weights()
    tolerance = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    found = loaded(family, merged)
    changed = 0
    for name, network in networks_of(found).items():
        expected = getattr(reference, name).state_dict()
        assert network.state_dict().keys() == expected.keys()
        for key, weight in network.state_dict().items():
            torch.testing.assert_close(weight, expected[key], atol=tolerance, rtol=tolerance)
            if torch.equal(expected[key], plain[name][key]):
                assert torch.equal(weight, expected[key]), key
            else:
                changed += 1
    assert changed == len(load_file(hero)) // 3
    for key, weight in found.vae.state_dict().items():
        assert torch.equal(weight, reference.vae.state_dict()[key]), key
    _check_file(base, merged, changed)


def _copied(network: nn.Module) -> Tensors:
    return {key: tensor.clone() for key, tensor in network.state_dict().items()}


def _check_file(base: Path, merged: Path, num_changed: int) -> None:
    """Keys, their order, dtypes, places and metadata are the base's, and so are all tensors that are not layers."""
    length = 8 + int.from_bytes(base.read_bytes()[:8], "little")
    assert merged.read_bytes()[:length] == base.read_bytes()[:length]
    assert json.loads(merged.read_bytes()[8:length])["__metadata__"] == METADATA
    before, after = load_file(base), load_file(merged)
    differing = {key for key in before if not torch.equal(before[key], after[key])}
    # q, k and v of OpenCLIP are one tensor.
    fused = sum("in_proj_weight" in key for key in differing)
    assert len(differing) == num_changed - 2 * fused
    assert all(key.startswith(("model.diffusion_model.", "cond_stage_model.", "conditioner.")) for key in differing)
    assert all(before[key].dtype == after[key].dtype for key in before)


def test_transposed_text_projection_is_merged(checkpoint: Any, tmp_path: Path) -> None:
    base, merged = checkpoint("sdxl"), tmp_path / "merged.safetensors"
    generator = torch.Generator().manual_seed(0)
    names = ("text_projection", "text_model_encoder_layers_1_self_attn_k_proj")
    state = {
        f"lora_te2_{name}": LoraWeights(
            torch.randn(2, 24, generator=generator), torch.randn(24, 2, generator=generator), 1.0
        )
        for name in names
    }
    assert merge_into(base_weights(base), merged, state) == 2
    before, after = (loaded("sdxl", file).text_encoder_2.state_dict() for file in (base, merged))
    paths = ("text_projection.weight", "text_model.encoder.layers.1.self_attn.k_proj.weight")
    for (name, weights), path in zip(state.items(), paths, strict=True):
        assert update(weights).T.ne(update(weights)).any(), name
        torch.testing.assert_close(after[path].double(), before[path].double() + update(weights), atol=1e-6, rtol=1e-6)
    assert all(torch.equal(before[path], after[path]) for path in before if path not in paths)


@torch.no_grad()
def outputs(pipeline: Any) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    width = pipeline.unet.config.cross_attention_dim
    latents, text, pooled = (torch.randn(2, *shape, generator=generator) for shape in ((4, 8, 8), (77, width), (24,)))
    more = {"text_embeds": pooled, "time_ids": torch.full((2, 6), 64.0)} if hasattr(pipeline, "text_encoder_2") else {}
    unet, *encoders = networks_of(pipeline).values()
    found = unet(latents, torch.tensor([10, 700]), text, added_cond_kwargs=more).sample
    tokens = torch.arange(2 * 77).reshape(2, 77)
    return [found, *(encoder(tokens, output_hidden_states=True).hidden_states[-1] for encoder in encoders)]


@pytest.mark.parametrize("family", FAMILIES)
def test_extract_recovers_the_merged_lora(
    family: Family, checkpoint: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, merged, out = checkpoint(family), tmp_path / "merged.safetensors", tmp_path / "out.safetensors"
    pipelines = [own_pipeline(family, torch.float32) for _ in range(2)]
    before = outputs(pipelines[0])
    hero = lora_for(family, pipelines[0], tmp_path / "hero.safetensors")
    run(capsys, "merge", hero, "--into", base, "--output", merged)
    assert "Left out" not in run(capsys, "extract", merged, base, out, "--rank", "4")
    for pipeline, file in zip(pipelines, (hero, out), strict=True):
        pipeline.load_lora_weights(file.parent, weight_name=file.name)
    for plain, one, other in zip(before, *(outputs(pipeline) for pipeline in pipelines), strict=True):
        assert (plain - one).abs().max() > 1e-2
        assert (one - other).abs().max() < 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_file_and_folder_of_one_base_compare(family: Family, checkpoint: Any, tmp_path: Path) -> None:
    base = checkpoint(family)
    pipeline = own_pipeline(family, torch.float32)
    *_, last = networks_of(pipeline).values()
    tuned = [pipeline.unet.conv_in.weight, pipeline.unet.conv_in.bias]
    tuned += [p for key, p in last.named_parameters() if "layers.0.self_attn.v_proj.weight" in key]
    with torch.no_grad():
        for parameter in tuned:
            parameter.add_(1)
    pipeline.save_pretrained(tmp_path / "folder")
    found, others = differences(base_weights(tmp_path / "folder"), base_weights(base))
    mark = "te2" if family == "sdxl" else "te"
    deltas = dict(found)
    assert set(deltas) == {"lora_unet_conv_in", f"lora_{mark}_text_model_encoder_layers_0_self_attn_v_proj"}
    for delta in deltas.values():
        torch.testing.assert_close(delta, torch.ones_like(delta))
    assert others == ["unet.conv_in.bias"]


def test_refused_merge_leaves_no_file(checkpoint: Any, tmp_path: Path) -> None:
    base = checkpoint("sd1")
    out = tmp_path / "out.safetensors"
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    good = {name: LoraWeights(torch.ones(2, 16), torch.ones(16, 2), 1.0)}
    wide = {name: LoraWeights(torch.ones(2, 40), torch.ones(16, 2), 1.0)}
    with pytest.raises(DataError, match=r"sd1\.safetensors.*\(16, 40\).*\(16, 16"):
        merge_into(base_weights(base), out, wide)
    with pytest.raises(DataError, match=r"sd1\.safetensors: 1 of its 1 modules"):
        merge_into(base_weights(base), out, {"lora_te_text_model_encoder_layers_7_mlp_fc1": good[name]})
    with pytest.raises(OutputError, match=r"sd1\.safetensors"):
        merge_into(base_weights(base), base, good)
    tensors = load_file(base)
    for change, reason in (
        ({"model.diffusion_model.input_blocks.0.0.weight": torch.ones(16, 9, 3, 3)}, "inpainting"),
        (
            {"model.diffusion_model.middle_block.0.in_layers.0.weight": None},
            "'mid_block.resnets.0.norm1",
        ),
        ({"model.diffusion_model.middle_block.0.in_layers.0.weight": torch.ones(5)}, "makes a weight of (5,)"),
    ):
        other = tmp_path / "other.safetensors"
        write_checkpoint(other, {key: t for key, t in {**tensors, **change}.items() if t is not None})
        with pytest.raises(BaseModelError, match=reason.replace("(", r"\(").replace(")", r"\)")):
            base_weights(other)
        other.unlink()
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes(base.read_bytes()[:-100])
    with pytest.raises(BaseModelError, match=r"torn\.safetensors.*bytes"):
        base_weights(torn)
    with pytest.raises(BaseModelError, match="nowhere"):
        base_weights(tmp_path / "nowhere.safetensors")
    with pytest.raises(DataError, match=r"sd1.*sdxl"):
        differences(base_weights(base), base_weights(checkpoint("sdxl")))
    assert {path.name for path in tmp_path.iterdir()} == {"sd1.safetensors", "sdxl.safetensors", "torn.safetensors"}


@pytest.fixture
def theirs(pipeline: Any, tmp_path: Path) -> LoraState:
    kohya_trainer(tmp_path / "theirs.safetensors", pipeline, text=True, conv=True)
    return read_file(tmp_path / "theirs.safetensors").state


def test_stable_diffusion_1_has_the_layers_that_kohya_trains() -> None:
    found = layers_by_name(empty_networks(None))
    blocks = [name for name in found if name.startswith("lora_unet_") and "_attentions_" in name]
    text = [name for name in found if name.startswith("lora_te_text_model_encoder_layers_")]
    assert (len(blocks), len(text)) == (192, 72)
    path, shape = found["lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"]
    assert (path, shape) == ("down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k", (640, 768))
    assert found["lora_unet_mid_block_attentions_0_proj_in"][1] == (1280, 1280, 1, 1)


def test_module_missing_in_the_base_is_refused_by_name(theirs: LoraState, tiny_base: Path) -> None:
    assert paths_for(theirs, tiny_base).keys() == theirs.keys()
    with pytest.raises(DataError, match=r"\(16, .*\(320, .*--base FOLDER"):
        paths_for(theirs, None)
    with pytest.raises(DataError, match=r"tiny: 1 of its 1 modules.*lora_unet_input_blocks"):
        paths_for({"lora_unet_input_blocks_1_1": next(iter(theirs.values()))}, tiny_base)
    with pytest.raises(BaseModelError, match=r"unet/config\.json"):
        paths_for(theirs, tiny_base / "unet")


def test_paths_without_a_base_are_those_of_the_files_family() -> None:
    inside = "attentions_0_transformer_blocks_0_attn2_to_k"
    for width, name, path in (
        (768, f"lora_unet_down_blocks_0_{inside}", "down_blocks.0"),
        (1024, f"lora_unet_down_blocks_0_{inside}", "down_blocks.0"),
        (2048, f"lora_unet_up_blocks_1_{inside}", "up_blocks.1"),
    ):
        own = {name: LoraWeights(torch.ones(2, width), torch.ones(640 if width == 2048 else 320, 2), 1.0)}
        assert paths_for(own, None)[name].startswith(f"{path}.attentions.0.")
        more = own | {
            "lora_te1_text_model_encoder_layers_11_mlp_fc1": LoraWeights(torch.ones(2, 768), torch.ones(3072, 2), 1.0)
        }
        if width == 2048:
            assert paths_for(more, None)["lora_te1_text_model_encoder_layers_11_mlp_fc1"].startswith("text_encoder.")
        else:
            with pytest.raises(DataError, match=r"Stable Diffusion [12]\.x: 1 of its 2.*'lora_te1_"):
                paths_for(more, None)
