import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.trainers import diffusers_script, kohya_trainer
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sdlora.errors import DataError
from sdlora.lora.inject import LoraState, LoraWeights
from sdlora.lora_files.base_weights import paths_for
from sdlora.lora_files.names import PEFT_METADATA, to_peft
from sdlora.lora_files.read import (
    MAX_HEADER_BYTES,
    describe_lora,
    family_of,
    header_bytes,
    parse_lora,
    read_file,
)
from sdlora.lora_files.write import metadata_of_new_ranks, tensors_sha256, write_file


def same(one: LoraState, other: LoraState) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(w.down, other[name].down) and torch.equal(w.up, other[name].up) and w.alpha == other[name].alpha
        for name, w in one.items()
    )


def metadata_in(file: Path) -> dict[str, str]:
    with safe_open(file, framework="pt") as opened:
        return dict(opened.metadata())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("text", "conv"), [(False, False), (True, True)])
def test_kohya_to_peft_and_back_is_bitwise_equal(
    pipeline: Any, tiny_base: Path, tmp_path: Path, dtype: torch.dtype, text: bool, conv: bool
) -> None:
    kohya_trainer(tmp_path / "kohya.safetensors", pipeline, dtype=dtype, text=text, conv=conv)
    first = read_file(tmp_path / "kohya.safetensors")
    paths = paths_for(first.state, tiny_base)
    write_file(tmp_path / "peft.safetensors", first.state, metadata=first.metadata, dtype=first.dtype, paths=paths)
    second = read_file(tmp_path / "peft.safetensors")
    write_file(tmp_path / "back.safetensors", second.state, metadata=second.metadata, dtype=second.dtype)
    before, after = load_file(tmp_path / "kohya.safetensors"), load_file(tmp_path / "back.safetensors")
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert torch.equal(tensor.float(), after[key].float())
        assert after[key].dtype == (torch.float32 if key.endswith(".alpha") else dtype)
    assert second.spelling == "peft"
    assert metadata_in(tmp_path / "back.safetensors").get(PEFT_METADATA) is None


def test_ranks_and_alphas_under_peft_names_reach_diffusers(pipeline: Any, tiny_base: Path, tmp_path: Path) -> None:
    kohya_trainer(tmp_path / "kohya.safetensors", pipeline, text=True, conv=True)
    plain = read_file(tmp_path / "kohya.safetensors").state
    state = {
        name: LoraWeights(w.down[: 1 + index % 4], w.up[:, : 1 + index % 4], alpha=0.5 + index % 3)
        for index, (name, w) in enumerate(plain.items())
    }
    paths = paths_for(state, tiny_base)
    write_file(tmp_path / "peft.safetensors", state, metadata={}, paths=paths)
    assert same(read_file(tmp_path / "peft.safetensors").state, state)
    pipeline.load_lora_weights(tmp_path, weight_name="peft.safetensors", adapter_name="theirs")
    for name, path in paths.items():
        network = pipeline.text_encoder if path.startswith("text_encoder.") else pipeline.unet
        layer = network.get_submodule(path.removeprefix("text_encoder."))
        assert layer.scaling["theirs"] == pytest.approx(state[name].alpha / state[name].down.shape[0])
        assert torch.equal(layer.lora_A["theirs"].weight, state[name].down)
        assert torch.equal(layer.lora_B["theirs"].weight, state[name].up)


@pytest.mark.parametrize(
    "config", [{}, {"alpha_pattern": {"to_q": 3}}, {"use_rslora": True}, {"rank_pattern": {"to_k": 2, "q_proj": 3}}]
)
@pytest.mark.parametrize("old_names", [True, False])
def test_diffusers_script_file_equals_its_peft_adapter(
    pipeline: Any, tmp_path: Path, config: dict[str, Any], old_names: bool
) -> None:
    file = tmp_path / "script.safetensors"
    diffusers_script(file, pipeline, text=True, old_names=old_names, **config)
    state = read_file(file).state
    layers = {
        prefix + path.replace(".", "_"): module
        for prefix, network in (("lora_unet_", pipeline.unet), ("lora_te_text_model_", pipeline.text_encoder))
        for path, module in network.named_modules()
        if hasattr(module, "lora_A")
    }
    assert state.keys() == layers.keys()
    for name, layer in layers.items():
        weights = state[name]
        assert weights.alpha / weights.down.shape[0] == pytest.approx(layer.scaling["default"], rel=1e-12)
        assert torch.equal(weights.down, layer.lora_A["default"].weight)
        assert torch.equal(weights.up, layer.lora_B["default"].weight)


def test_oldest_diffusers_names_map_to_the_same_modules() -> None:
    block = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    down, up = torch.ones(2, 3), torch.ones(4, 2)
    tensors = {
        f"{block}.processor.to_q_lora.down.weight": down, f"{block}.processor.to_q_lora.up.weight": up,
        f"unet.{block}.processor.to_out_lora.down.weight": down, f"unet.{block}.processor.to_out_lora.up.weight": up,
        "text_encoder.text_model.encoder.layers.0.self_attn.to_out_lora.down.weight": down,
        "text_encoder.text_model.encoder.layers.0.self_attn.to_out_lora.up.weight": up,
        "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_linear_layer.down.weight": down,
        "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_linear_layer.up.weight": up,
    }  # fmt: skip
    kohya = f"lora_unet_{block.replace('.', '_')}"
    assert list(parse_lora(tensors, {}, name="old").state) == [
        f"{kohya}_to_q", f"{kohya}_to_out_0",
        "lora_te_text_model_encoder_layers_0_self_attn_out_proj", "lora_te_text_model_encoder_layers_0_mlp_fc1",
    ]  # fmt: skip


def test_two_text_encoders_read_and_write_back(tmp_path: Path) -> None:
    paths = [f"{network}.encoder.layers.0.mlp.fc1" for network in ("text_encoder", "text_encoder_2")]
    tensors, metadata = to_peft({path: LoraWeights(torch.ones(2, 3), torch.ones(4, 2), 2.0) for path in paths})
    state = parse_lora(tensors, {PEFT_METADATA: metadata}, name="xl").state
    assert list(state) == [f"lora_te{i}_text_model_encoder_layers_0_mlp_fc1" for i in (1, 2)]
    write_file(tmp_path / "xl.safetensors", state, metadata={})
    assert same(read_file(tmp_path / "xl.safetensors").state, state)
    assert family_of(state) == "stable-diffusion-xl-v1-base"


@pytest.mark.parametrize(("width", "version"), [(768, "sd_v1"), (1024, "sd_v2"), (2048, "sdxl_base_v1-0")])
def test_family_is_found_from_weights_and_written(tmp_path: Path, width: int, version: str) -> None:
    key = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    tensors = {f"{key}.lora_A.weight": torch.ones(2, width), f"{key}.lora_B.weight": torch.ones(4, 2)}
    save_file(tensors, tmp_path / "in.safetensors")
    file = read_file(tmp_path / "in.safetensors", "rank")
    write_file(tmp_path / "out.safetensors", file.state, metadata=file.metadata)
    written = metadata_in(tmp_path / "out.safetensors")
    assert written["ss_base_model_version"] == version
    assert written["modelspec.architecture"] == f"{family_of(file.state)}/lora"


@pytest.mark.parametrize(("missing", "alpha"), [("rank", 4.0), ("2.5", 2.5)])
def test_missing_alpha_must_be_given(pipeline: Any, tmp_path: Path, missing: str, alpha: float) -> None:
    diffusers_script(tmp_path / "peft.safetensors", pipeline, told=False)
    kohya_trainer(tmp_path / "kohya.safetensors", pipeline, alpha=None)
    for file in tmp_path.iterdir():
        with pytest.raises(DataError, match="--missing-alpha rank"):
            read_file(file)
        with pytest.raises(DataError, match="a lot"):
            read_file(file, "a lot")
        assert {weights.alpha for weights in read_file(file, missing).state.values()} == {alpha}
        described = describe_lora(file)
        assert (described["alphas"], described["update_norm"]) == ("not in the file", None)


def test_metadata_is_kept_and_hashes_are_updated(pipeline: Any, tmp_path: Path) -> None:
    kohya_trainer(tmp_path / "in.safetensors", pipeline)
    file = read_file(tmp_path / "in.safetensors")
    write_file(tmp_path / "out.safetensors", file.state, metadata=file.metadata, dtype=file.dtype)
    written, tensors = metadata_in(tmp_path / "out.safetensors"), load_file(tmp_path / "out.safetensors")
    assert written["sshs_model_hash"] == tensors_sha256(tensors)
    assert written["modelspec.hash_sha256"] == f"0x{written['sshs_model_hash']}"
    assert "sshs_legacy_hash" not in written
    assert (written["modelspec.title"], written["ss_steps"], written["ss_sd_model_hash"]) == ("theirs", "100", "abc")
    assert (written["ss_network_dim"], written["ss_network_alpha"]) == ("4", "1.0")
    assert metadata_of_new_ranks([file])["ss_steps"] == "100"
    of_two = metadata_of_new_ranks([file, file])
    assert of_two == {
        "ss_network_module": "networks.lora", "ss_base_model_version": "sd_v1", "ss_sd_model_hash": "abc",
    }  # fmt: skip


def test_converted_file_leaves_out_what_programs_do_not_read(tmp_path: Path) -> None:
    state = {"lora_unet_x": LoraWeights(torch.ones(2, 3), torch.ones(4, 2), 2.0)}
    metadata = {"ss_tag_frequency": "y" * (1 << 20), "ss_dataset_dirs": "z" * 5000, "ss_steps": "100"}
    assert write_file(tmp_path / "out.safetensors", state, metadata=metadata) == ["ss_tag_frequency"]
    kept = metadata_in(tmp_path / "out.safetensors")
    assert kept["ss_dataset_dirs"] == "z" * 5000 and kept["ss_steps"] == "100" and "ss_tag_frequency" not in kept
    assert header_bytes(tmp_path / "out.safetensors") <= MAX_HEADER_BYTES


XL = "stable-diffusion-xl-v1-base"
GOOD = {"unet.conv1.lora_A.weight": torch.ones(2, 3), "unet.conv1.lora_B.weight": torch.ones(4, 2)}
KOHYA = {"lora_unet_x.lora_down.weight": torch.ones(2, 3), "lora_unet_x.lora_up.weight": torch.ones(4, 2)}


def test_magnitudes_of_outputs_under_kohyas_names_are_read() -> None:
    square = {"lora_unet_x.lora_down.weight": torch.ones(2, 4), "lora_unet_x.lora_up.weight": torch.ones(4, 2)}
    scale = torch.arange(4.0)
    for part, shape in ((KOHYA, (4, 1)), (square, (4, 1))):
        found = parse_lora(part | {"lora_unet_x.dora_scale": scale.reshape(shape)}, {}, name="dora")
        magnitude = found.state["lora_unet_x"].magnitude
        assert magnitude is not None and torch.equal(magnitude.flatten(), scale) and found.spelling == "kohya"
    with pytest.raises(DataError, match="for each input"):
        parse_lora(square | {"lora_unet_x.dora_scale": scale.reshape(1, 4)}, {}, name="dora")


@pytest.mark.parametrize(
    ("tensors", "settings", "reason"),
    [
        (GOOD | {"unet.conv1.other": torch.ones(1)}, {}, "unet.conv1.other"),
        (GOOD | {"unet.conv1.lora_B.bias": torch.ones(4)}, {}, "lora_B.bias"),
        (GOOD | {"base_model.model.x.lora_A.weight": torch.ones(1)}, {}, "base_model.model.x"),
        (GOOD | KOHYA, {}, "mixes"),
        (GOOD | {"unet.conv1.lora.down.weight": torch.ones(2, 3)}, {}, "twice"),
        (GOOD | {"unet.conv1.lora_B.weight": torch.ones(4, 5)}, {}, "do not match"),
        (GOOD | {"unet.conv1.lora_magnitude_vector": torch.ones(3)}, {}, "do not match"),
        (GOOD | {"unet.conv1.alpha": torch.ones(2)}, {}, "alpha of .*conv1.* found 2"),
        ({"unet.conv1.lora_A.weight": torch.ones(2, 3)}, {}, "no lora_up"),
        (GOOD, {"unet.r": 2}, "unet.lora_alpha"),
        (GOOD, {"unet.lora_alpha": "much"}, "unet.lora_alpha"),
        (GOOD, {"unet.lora_alpha": 1, "unet.alpha_pattern": {"(a+)+": 2}}, "regular expressions"),
        (GOOD, [1], "JSON object"),
        (KOHYA | {"lora_unet_x.dora_scale": torch.ones(1, 3)}, {}, "lora_unet_x.*magnitude for each input.*(1, 3)"),
        (KOHYA | {"lora_unet_x.dora_scale": torch.ones(3, 1)}, {}, "do not match.*3 magnitudes"),
        (KOHYA | {"lora_unet_x.hada_w1_a": torch.ones(4, 1)}, {}, "hada_w1_a"),
    ],
)  # fmt: skip
def test_tensors_that_are_not_plain_lora_are_refused(
    tensors: dict[str, torch.Tensor], settings: Any, reason: str
) -> None:
    with pytest.raises(DataError, match=reason):
        parse_lora(tensors, {PEFT_METADATA: json.dumps(settings)} if settings else {}, name="odd")


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float64, torch.float16])
def test_alphas_of_any_type_and_weights_in_float64_are_read(tmp_path: Path, dtype: torch.dtype) -> None:
    """diffusers' converter and sd-scripts' svd_merge_lora.py write integers."""
    file = tmp_path / "lora.safetensors"
    save_file(
        {key: tensor.double() for key, tensor in KOHYA.items()} | {"lora_unet_x.alpha": torch.tensor(3, dtype=dtype)},
        file,
    )
    (weights,) = read_file(file).state.values()
    assert (weights.alpha, weights.down.dtype) == (3.0, torch.float32)


@pytest.mark.parametrize("alpha", [10**400, -1, 0, float("inf"), float("nan")])
def test_impossible_alpha_of_peft_is_refused(alpha: float) -> None:
    with pytest.raises(DataError, match=r"alpha"):
        parse_lora(GOOD, {PEFT_METADATA: json.dumps({"unet.lora_alpha": alpha})}, name="odd")


def test_deeply_nested_peft_metadata_is_refused() -> None:
    with pytest.raises(DataError, match="not valid JSON"):
        parse_lora(GOOD, {PEFT_METADATA: "[" * 200_000}, name="deep")


OTHERS = {
    "lora_unet_x.lokr_w1": "LoKr", "lora_unet_x.lora_mid.weight": "Tucker", "lora_unet_x.oft_blocks": "OFT",
    "oft_unet_x.oft_blocks": "OFT", "lora_unet_x.a1.weight": "GLoRA", "lora_unet_x.diff": "differences",
    "lora_unet_x.on_input": "IA", "bundle_emb.zumi.string_to_param.*": "bundle_emb",
}  # fmt: skip


@pytest.mark.parametrize(("key", "kind"), OTHERS.items())
def test_other_kinds_are_named(key: str, kind: str) -> None:
    with pytest.raises(DataError, match=rf"^odd is .*{kind}"):
        parse_lora(KOHYA | {key: torch.ones(2, 2)}, {}, name="odd")


def test_dylora_of_a_convolution_is_named() -> None:
    tensors = {"lora_unet_x.lora_down.weight": torch.ones(2, 3, 3, 3), "lora_unet_x.lora_up.weight": torch.ones(4, 2)}
    with pytest.raises(DataError, match="DyLoRA"):
        parse_lora(tensors, {"ss_network_module": "networks.dylora"}, name="odd")


def test_metadata_tells_the_family_of_convolutions(tmp_path: Path) -> None:
    """Without cross-attention, shapes do not tell Stable Diffusion XL, whose layers A1111 knows by other names."""
    name = "lora_unet_output_blocks_2_2_conv"
    state = {
        "lora_unet_up_blocks_0_upsamplers_0_conv": LoraWeights(torch.ones(2, 3, 3, 3), torch.ones(4, 2, 1, 1), 2.0)
    }
    for said in ({"ss_base_model_version": "sdxl_base_v1-0"}, {"modelspec.architecture": f"{XL}/lora"}):
        write_file(tmp_path / "out.safetensors", state, metadata=said)
        assert f"{name}.alpha" in load_file(tmp_path / "out.safetensors")
        assert metadata_in(tmp_path / "out.safetensors")["ss_base_model_version"] == "sdxl_base_v1-0"
        assert family_of(state, said) == XL
    assert family_of(state, {}) is None
