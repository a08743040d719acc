from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.trainers import kohya_trainer

from sdlora.errors import BaseModelError, DataError
from sdlora.lora.inject import LoraState, LoraWeights
from sdlora.lora_files.base_folder import empty_networks, layers_by_name, paths_for
from sdlora.lora_files.read import read_file


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
