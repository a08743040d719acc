import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from trainers import kohya_trainer

from sdlora.errors import BaseModelError, DataError, OutputError
from sdlora.files import sha256
from sdlora.lora.folders import differences, merge_into, module_paths, paths_for
from sdlora.lora.formats import read_file
from sdlora.lora.inject import LoraState, LoraWeights
from sdlora.lora.tools import update

UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def theirs(pipeline: Any, tmp_path: Path) -> LoraState:
    kohya_trainer(tmp_path / "theirs.safetensors", pipeline, text=True, conv=True)
    return read_file(tmp_path / "theirs.safetensors").state


def test_stable_diffusion_15_has_the_layers_that_kohya_trains() -> None:
    found = module_paths(None)
    blocks = [name for name in found if name.startswith("lora_unet_") and "_attentions_" in name]
    text = [name for name in found if name.startswith("lora_te_text_model_encoder_layers_")]
    assert (len(blocks), len(text)) == (192, 72)
    path, shape = found["lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"]
    assert (path, shape) == ("down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k", (640, 768))
    assert found["lora_unet_mid_block_attentions_0_proj_in"][1] == (1280, 1280, 1, 1)


def test_modules_that_a_base_does_not_have_are_refused_by_name(theirs: LoraState, tiny_base: Path) -> None:
    assert paths_for(theirs, tiny_base).keys() == theirs.keys()
    with pytest.raises(DataError, match=r"makes an update of .*--base FOLDER"):
        paths_for(theirs, None)
    with pytest.raises(DataError, match=r"1 modules are not in tiny.*lora_unet_input_blocks"):
        paths_for({"lora_unet_input_blocks_1_1": next(iter(theirs.values()))}, tiny_base)
    with pytest.raises(BaseModelError, match=r"unet/config\.json"):
        paths_for(theirs, tiny_base / "unet")


def test_without_a_base_a_file_s_own_family_is_taken() -> None:
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
            with pytest.raises(DataError, match=r"not in Stable Diffusion [12]\.x, the first is 'lora_te1_"):
                paths_for(more, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_base_takes_a_lora_in_and_gives_it_back(
    pipeline: Any, theirs: LoraState, tmp_path: Path, dtype: torch.dtype
) -> None:
    base, output = tmp_path / "base", tmp_path / "merged"
    pipeline.to(dtype).save_pretrained(base)
    assert merge_into(base, output, theirs) == len(theirs)
    before, after = load_file(base / UNET), load_file(output / UNET)
    for path, _ in pipeline.unet.named_modules():
        name, key = "lora_unet_" + path.replace(".", "_"), f"{path}.weight"
        if name in theirs:
            delta = update(theirs[name]).float().reshape(before[key].shape)
            assert torch.equal(after[key], (before[key].float() + delta).to(dtype))
        elif key in before:
            assert torch.equal(after[key], before[key])
    assert sha256(output / "model_index.json") == sha256(base / "model_index.json")
    StableDiffusionPipeline.from_pretrained(output)
    found, others = differences(output, base)
    assert (found.keys(), others) == (theirs.keys(), [])
    for name, weights in theirs.items():
        error = (found[name].double().flatten(1) - update(weights)).norm() / update(weights).norm()
        assert error < (1e-5 if dtype == torch.float32 else 0.02)


def test_what_does_not_fit_leaves_nothing_behind(theirs: LoraState, tiny_base: Path, tmp_path: Path) -> None:
    name = next(iter(theirs))
    cases: list[tuple[LoraState, str]] = [
        ({**theirs, "lora_unet_nowhere": theirs[name]}, "1 modules are not in tiny, among them 'lora_unet_nowhere'"),
        ({**theirs, name: LoraWeights(torch.ones(2, 5), torch.ones(4, 2), 1.0)}, "makes an update of"),
    ]
    for state, reason in cases:
        with pytest.raises(DataError, match=reason):
            merge_into(tiny_base, tmp_path / "merged", state)
    torn = tmp_path / "torn"
    shutil.copytree(tiny_base, torn)
    (torn / UNET).write_bytes((tiny_base / UNET).read_bytes()[:-100])
    with pytest.raises(BaseModelError, match="not a readable"):
        merge_into(torn, tmp_path / "merged", theirs)
    (torn / "unet" / "model.bin").write_bytes(b"pickle")
    with pytest.raises(BaseModelError, match=r"model\.bin"):
        merge_into(torn, tmp_path / "merged", theirs)
    with pytest.raises(BaseModelError, match=r"model_index\.json"):
        merge_into(tiny_base / "unet", tmp_path / "merged", theirs)
    with pytest.raises(OutputError, match="exists already"):
        merge_into(tiny_base, torn, theirs)
    with pytest.raises(OutputError, match="inside the base"):
        merge_into(tiny_base, tiny_base / "merged", theirs)
    assert not [path for path in tmp_path.iterdir() if "merged" in path.name]


def test_what_no_lora_holds_is_named_and_other_bases_are_refused(tiny_base: Path, tmp_path: Path) -> None:
    tuned = tmp_path / "tuned"
    shutil.copytree(tiny_base, tuned)
    tensors = load_file(tuned / UNET)
    tensors["conv_norm_out.weight"] += 1
    tensors["conv_in.bias"] += 1
    tensors["conv_in.weight"] += 1
    save_file(tensors, tuned / UNET)
    found, others = differences(tuned, tiny_base)
    assert list(found) == ["lora_unet_conv_in"]
    assert set(others) == {"unet.conv_norm_out.weight", "unet.conv_in.bias"}
    save_file(tensors | {"conv_in.weight": torch.ones(3, 3)}, tuned / UNET)
    with pytest.raises(DataError, match="has the shapes"):
        differences(tuned, tiny_base)
    save_file(tensors | {"more.weight": torch.ones(3, 3)}, tuned / UNET)
    with pytest.raises(DataError, match=r"not of one kind.*more\.weight"):
        differences(tuned, tiny_base)
