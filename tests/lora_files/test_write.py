import json
import struct
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.adapters import UNET_TARGETS, injected, trained
from peft import LoraConfig, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sdlora.errors import DataError, DivergedError, ExportError
from sdlora.lora.inject import AdapterSpec, LoraState, find_targets, inject
from sdlora.lora.timestep_rank import TimestepRank
from sdlora.lora_files.elsewhere import check_same_weights
from sdlora.lora_files.names import kohya_name, portable_state
from sdlora.lora_files.read import Spelling, describe_lora, large_header_note, read_file, read_tensors
from sdlora.lora_files.verify import _distance, verify_lora
from sdlora.lora_files.write import LoraMetadata, add_metadata, save_lora

METADATA = LoraMetadata(
    name="hero", base="/home/someone/models/base", architecture="stable-diffusion-v1", resolution_px=64,
    trigger="zumi", epoch=3, step=12, started=1.7e9, settings={"lora": {"rank": 4}},
)  # fmt: skip


def by_path(file: Path, paths: Iterable[str]) -> LoraState:
    """A file's weights under the paths of the network that has them."""
    known = {kohya_name(path): path for path in paths}
    return {known[name]: weights for name, weights in read_file(file).state.items()}


@pytest.mark.parametrize("rank", [1, 8, 64])
@pytest.mark.parametrize("alpha", ["one", "half", "rank"])
def test_diffusers_loads_any_rank_and_alpha_exactly(pipeline: Any, tmp_path: Path, rank: int, alpha: str) -> None:
    adapter = trained(pipeline.unet, rank, {"one": 1.0, "half": rank / 2, "rank": float(rank)}[alpha])
    adapter.remove()
    save_lora(tmp_path / "hero.safetensors", adapter.state(), metadata=METADATA)
    verification = verify_lora(tmp_path / "hero.safetensors", adapter.state(), pipeline)
    assert verification.max_error == 0.0
    assert verification.max_effect > 1e-3
    assert verification.num_modules == 40


SPECS = {
    "plain": AdapterSpec(),
    "rslora": AdapterSpec(rslora=True),
    "ranks and alphas by target": AdapterSpec(
        target_ranks={"mlp": 3, "conv": 2}, target_alphas={"self_attention": 3.3}
    ),
    "rslora with other ranks": AdapterSpec(rslora=True, target_ranks={"mlp": 3}),
    "dora": AdapterSpec(dora=True),
    "dora with other ranks": AdapterSpec(dora=True, target_ranks={"conv": 2}, target_alphas={"conv": 5.0}),
    "orthogonal": AdapterSpec(init="orthogonal"),
    "pissa": AdapterSpec(init="pissa", target_ranks={"mlp": 3}),
    "timestep rank": AdapterSpec(timestep_rank=TimestepRank(1, 1.0), init="orthogonal"),
}


@pytest.mark.parametrize("targets", [UNET_TARGETS, ["text_encoder"], [*UNET_TARGETS, "text_encoder"], ["projection"]])
@pytest.mark.parametrize("name", list(SPECS))
def test_diffusers_loads_every_kind_on_every_target_exactly(
    pipeline: Any, tmp_path: Path, name: str, targets: list[str]
) -> None:
    spec = SPECS[name]
    adapter = injected(pipeline, targets, spec)
    adapter.remove()
    file, state = tmp_path / "hero.safetensors", adapter.state()
    spelling: Spelling = "peft" if spec.dora else "kohya"
    save_lora(file, state, metadata=replace(METADATA, timestep_rank=spec.timestep_rank), spelling=spelling)
    verification = verify_lora(file, state, pipeline, spec.timestep_rank)
    assert verification.max_error == 0.0
    assert verification.max_effect > 1e-3
    assert verification.num_modules == len(state)
    assert verification.max_rewriting_error < 1e-4 * max(1.0, verification.max_effect)
    rewritten = spec.init != "gaussian" or bool({*spec.target_alphas, "rslora with other ranks"} & {*targets, name})
    assert rewritten or verification.max_rewriting_error == 0.0
    assert (verification.rank_mask_difference is None) == (spec.timestep_rank is None)
    found = by_path(file, adapter.layers)
    for path, weights in portable_state(state).items():
        assert torch.equal(found[path].down, weights.down)
        assert torch.equal(found[path].up, weights.up)
        assert found[path].alpha == weights.alpha
        kept = found[path].magnitude
        assert (kept is None) == (weights.magnitude is None)
        assert kept is None or torch.equal(kept, weights.magnitude)
    described = describe_lora(file)
    assert set(described["modules"]) == set(targets)
    assert described["dora"] == spec.dora


def spoil(path: Path, change: str) -> None:
    tensors = load_file(path)
    alphas = [key for key in tensors if key.endswith(".alpha")]
    if change == "no alpha":
        tensors = {key: value for key, value in tensors.items() if key not in alphas}
    elif change == "one module less":
        tensors = {k: v for k, v in tensors.items() if not k.startswith(alphas[0].removesuffix(".alpha"))}
    else:
        key = alphas[3].replace(".alpha", ".lora_up.weight")
        tensors[key] = tensors[key] + 1e-4
    save_file(tensors, path)


@pytest.mark.parametrize("change", ["no alpha", "one module less", "one number off"])
def test_verification_fails_on_a_damaged_file(pipeline: Any, state: LoraState, tmp_path: Path, change: str) -> None:
    file = tmp_path / "hero.safetensors"
    save_lora(file, state, metadata=METADATA)
    spoil(file, change)
    with pytest.raises(ExportError):
        verify_lora(file, state, pipeline)


def test_metadata_has_what_other_programs_read_and_no_paths(state: LoraState, tmp_path: Path) -> None:
    file = tmp_path / "hero.safetensors"
    save_lora(file, state, metadata=METADATA)
    with safe_open(file, framework="pt") as opened:
        metadata, keys = opened.metadata(), list(opened.keys())
    assert metadata["modelspec.sai_model_spec"] == "1.0.1"
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert metadata["modelspec.title"] == metadata["ss_output_name"] == "hero"
    assert metadata["modelspec.trigger_phrase"] == "zumi"
    assert "zumi" in metadata["modelspec.usage_hint"]
    assert metadata["ss_base_model_version"] == "sd_v1"
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("4", "2.0")
    assert metadata["modelspec.hash_sha256"] == "0x" + metadata["sshs_model_hash"]
    assert metadata["ss_sd_model_name"] == "base"
    assert "/home" not in json.dumps(metadata)
    assert len(keys) == 3 * 40
    assert "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_q.lora_down.weight" in keys


def test_read_returns_what_was_written(unet: Any, state: LoraState, tmp_path: Path) -> None:
    file = tmp_path / "hero.safetensors"
    save_lora(file, state, metadata=METADATA)
    found = by_path(file, [name for name, _ in unet.named_modules()])
    assert set(found) == set(state)
    for path, weights in state.items():
        assert torch.equal(found[path].down, weights.down)
        assert torch.equal(found[path].up, weights.up)
        assert found[path].alpha == weights.alpha
    with pytest.raises(KeyError):
        by_path(file, ["conv_in"])


def test_description_counts_modules_and_norm(state: LoraState, tmp_path: Path) -> None:
    file = tmp_path / "hero.safetensors"
    save_lora(file, state, metadata=METADATA)
    found = describe_lora(file)
    assert found["modules"] == {"cross_attention": 16, "self_attention": 16, "mlp": 8}
    assert (found["ranks"], found["alphas"], found["trigger"]) == ([4], [2.0], "zumi")
    expected = sum(float((w.up @ w.down * 0.5).pow(2).sum()) for w in state.values()) ** 0.5
    assert found["update_norm"] == pytest.approx(expected, rel=1e-4)


NAME = "lora_unet_x"


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({}, "no tensors"),
        ({"unet.x.lora_C.weight": torch.ones(2, 3)}, "lora_C"),
        ({f"{NAME}.lora_down.weight": torch.ones(2, 3)}, "no lora_up"),
        (
            {f"{NAME}.lora_down.weight": torch.ones(2, 3), f"{NAME}.lora_up.weight": torch.ones(4, 5),
             f"{NAME}.alpha": torch.tensor(1.0)}, "do not match",
        ),
        (
            {f"{NAME}.lora_down.weight": torch.full((2, 3), float("nan")), f"{NAME}.lora_up.weight": torch.ones(4, 2),
             f"{NAME}.alpha": torch.tensor(1.0)}, "finite",
        ),
        ({f"{NAME}.lora_down.weight": torch.ones(2, 3, dtype=torch.int64)}, "finite"),
        (
            {f"{NAME}.lora_down.weight": torch.full((2, 3), 1e300, dtype=torch.float64),
             f"{NAME}.lora_up.weight": torch.ones(4, 2), f"{NAME}.alpha": torch.tensor(1.0)}, "finite",
        ),
        *(
            ({f"{NAME}.lora_down.weight": torch.ones(2, 3), f"{NAME}.lora_up.weight": torch.ones(4, 2),
              f"{NAME}.alpha": torch.tensor(alpha)}, "above 0") for alpha in (0.0, -1.0)
        ),
    ],
)  # fmt: skip
def test_tensors_that_are_not_lora_are_refused(tmp_path: Path, tensors: dict[str, torch.Tensor], reason: str) -> None:
    file = tmp_path / "odd.safetensors"
    save_file(tensors, file)
    with pytest.raises(DataError, match=reason):
        read_file(file)


def test_files_that_are_not_safetensors_are_refused(tmp_path: Path) -> None:
    for index, content in enumerate(
        [b"", b"PK\x03\x04" * 9, struct.pack("<Q", 1 << 62) + b"{}", struct.pack("<Q", 2) + b"{", b"\x80\x04pickle" * 3]
    ):
        file = tmp_path / f"{index}.safetensors"
        file.write_bytes(content)
        with pytest.raises(DataError):
            read_file(file)
    with pytest.raises(DataError, match="nowhere"):
        read_file(tmp_path / "nowhere.safetensors")


def test_header_above_what_other_programs_read_is_read_and_told(tmp_path: Path) -> None:
    huge, small = tmp_path / "huge.safetensors", tmp_path / "small.safetensors"
    save_file({"a": torch.ones(1)}, huge, metadata={"ss_tag_frequency": "y" * (2 << 20)})
    save_file({"a": torch.ones(1)}, small)
    assert len(read_tensors(huge)[1]["ss_tag_frequency"]) == 2 << 20
    assert "2.0 MiB" in (large_header_note(huge) or "")
    assert large_header_note(small) is None


@pytest.mark.parametrize("spec", [AdapterSpec(), AdapterSpec(dora=True), AdapterSpec(init="pissa")])
def test_description_counts_trained_parameters(unet: Any, tmp_path: Path, spec: AdapterSpec) -> None:
    adapter = inject(unet, find_targets(unet, ["cross_attention"]), 4, 2.0, seed=1, spec=spec)
    save_lora(tmp_path / "hero.safetensors", adapter.state(), metadata=METADATA)
    found = describe_lora(tmp_path / "hero.safetensors")
    assert found["parameters"] == adapter.num_parameters()
    assert (found["update_norm"] is None) == spec.dora
    assert (found["dora"], found["frozen_start"]) == (spec.dora, spec.init == "pissa")


def test_nan_counts_as_an_infinite_difference() -> None:
    zeros, nan = torch.zeros(2), torch.full((2,), float("nan"))
    assert _distance([zeros, nan], [zeros, zeros]) == _distance([nan, zeros], [zeros, zeros]) == float("inf")
    assert _distance([zeros, zeros], [zeros, zeros + 2]) == 2.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("spelling", ["kohya", "peft"])
@pytest.mark.parametrize("spec", ["plain", "ranks and alphas by target", "pissa", "dora"])
def test_every_spelling_and_type_is_verified(
    pipeline: Any, tmp_path: Path, spelling: Any, dtype: torch.dtype, spec: str
) -> None:
    adapter = injected(pipeline, [*UNET_TARGETS, "text_encoder"], SPECS[spec])
    adapter.remove()
    file, state = tmp_path / "hero.safetensors", adapter.state()
    save_lora(file, state, metadata=METADATA, spelling=spelling, dtype=dtype)
    tensors = load_file(file)
    assert {t.dtype for key, t in tensors.items() if not key.endswith(".alpha")} == {dtype}
    assert describe_lora(file)["names"] == spelling
    if (spec, spelling) == ("dora", "kohya"):
        check_same_weights(file, state, dtype, two_text_encoders=False)
    else:
        verification = verify_lora(file, state, pipeline, dtype=dtype)
        assert verification.max_error == 0.0
        # Rounding moves the outputs, and by little.
        assert 0.0 < verification.max_rewriting_error < 0.05 * verification.max_effect
    reread = read_file(file).state
    for path, weights in portable_state(state).items():
        found = reread[kohya_name(path)]
        assert torch.equal(found.down, weights.down.to(dtype).float())
        assert found.alpha == weights.alpha


def test_float16_overflow_is_refused(state: LoraState, tmp_path: Path) -> None:
    path = next(iter(state))
    large = {**state, path: replace(state[path], up=state[path].up + 1e6)}
    with pytest.raises(ExportError, match=r"lora_up.weight.*float16"):
        save_lora(tmp_path / "hero.safetensors", large, metadata=METADATA, dtype=torch.float16)
    assert not list(tmp_path.iterdir())


def test_peft_names_and_settings_equal_pefts(pipeline: Any, tmp_path: Path) -> None:
    adapter = trained(pipeline.unet, 4, 2.0)
    adapter.remove()
    file = tmp_path / "hero.safetensors"
    save_lora(file, adapter.state(), metadata=METADATA, spelling="peft")
    with safe_open(file, framework="pt") as opened:
        settings = json.loads(opened.metadata()["lora_adapter_metadata"])
    own = {key.removeprefix("unet."): value for key, value in settings.items()}
    network = pipeline.unet
    network.add_adapter(LoraConfig(**own))
    expected = {f"unet.{key}": tensor for key, tensor in get_peft_model_state_dict(network).items()}
    found = load_file(file)
    assert found.keys() == expected.keys()
    assert all(found[key].shape == expected[key].shape for key in found)


def test_added_metadata_moves_no_tensor(state: LoraState, tmp_path: Path) -> None:
    file = tmp_path / "hero.safetensors"
    save_lora(file, state, metadata=METADATA)
    content, before = file.read_bytes(), load_file(file)
    body = content[8 + int.from_bytes(content[:8], "little") :]
    add_metadata(file, {"modelspec.thumbnail": "data:image/jpeg;base64,eA=="})
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    assert metadata["modelspec.thumbnail"] == "data:image/jpeg;base64,eA=="
    assert metadata["modelspec.title"] == "hero"
    after = load_file(file)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert file.read_bytes().endswith(body)
    assert int.from_bytes(file.read_bytes()[:8], "little") % 8 == 0
    with pytest.raises(ExportError, match="1048576"):
        add_metadata(file, {"modelspec.thumbnail": "x" * (1 << 20)})
    assert all(torch.equal(load_file(file)[key], before[key]) for key in before)


def test_file_with_too_large_header_is_not_written(state: LoraState, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="1048576"):
        save_lora(tmp_path / "x.safetensors", state, metadata=replace(METADATA, private={"a": "x" * (1 << 20)}))
    assert not list(tmp_path.iterdir())


def test_diverged_model_is_named_as_such(pipeline: Any, state: LoraState, tmp_path: Path) -> None:
    file, path = tmp_path / "hero.safetensors", next(iter(state))
    large = {**state, path: replace(state[path], up=state[path].up * 1e38, down=state[path].down * 1e38)}
    save_lora(file, large, metadata=METADATA)
    with pytest.raises(DivergedError, match="diverged"):
        verify_lora(file, large, pipeline)
