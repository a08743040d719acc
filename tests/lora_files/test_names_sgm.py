import pytest
from helpers.readers import unet_names

from sdlora.lora_files.names_sgm import authors_name, diffusers_name
from sdlora.models.architectures import Family

SINGLE = {
    "input_blocks_0_0": "conv_in", "out_2": "conv_out", "time_embed_0": "time_embedding_linear_1",
    "time_embed_2": "time_embedding_linear_2", "label_emb_0_0": "add_embedding_linear_1",
    "label_emb_0_2": "add_embedding_linear_2",
}  # fmt: skip


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_every_layer_converts_between_both_names(family: Family) -> None:
    names = unet_names(family) | SINGLE
    assert {diffusers_name(f"lora_unet_{authors}") for authors in names} == {f"lora_unet_{n}" for n in names.values()}
    for authors, diffusers in names.items():
        assert diffusers_name(f"lora_unet_{authors}") == f"lora_unet_{diffusers}"
        if family == "sdxl":
            assert authors_name(f"lora_unet_{diffusers}") == f"lora_unet_{authors}"


@pytest.mark.parametrize("name", ["lora_te1_text_model_encoder_layers_0_mlp_fc1", "lora_unet_mid_block", "x"])
def test_other_names_are_unchanged(name: str) -> None:
    assert diffusers_name(name) == authors_name(name) == name
