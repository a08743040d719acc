import hashlib
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from helpers.trainers import kohya_trainer
from safetensors.torch import load_file, save_file

from sdlora.errors import BaseModelError, DataError, ExportError, OutputError
from sdlora.lora.inject import LoraState, LoraWeights
from sdlora.lora_files.algebra import update
from sdlora.lora_files.base_weights import base_weights
from sdlora.lora_files.merge import differences, merge_into, merge_loras
from sdlora.lora_files.read import read_file

UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def theirs(pipeline: Any, tmp_path: Path) -> LoraState:
    kohya_trainer(tmp_path / "theirs.safetensors", pipeline, text=True, conv=True)
    return read_file(tmp_path / "theirs.safetensors").state


def header_bytes(file: Path) -> bytes:
    content = file.read_bytes()
    return content[: 8 + int.from_bytes(content[:8], "little")]


def merge(base: Path, output: Path, state: LoraState) -> int:
    return merge_into(base_weights(base), output, state)


def differ(tuned: Path, base: Path) -> tuple[dict[str, torch.Tensor], list[str]]:
    found, others = differences(base_weights(tuned), base_weights(base))
    return dict(found), others


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_merged_lora_is_the_difference_of_the_bases(
    pipeline: Any, theirs: LoraState, tmp_path: Path, dtype: torch.dtype
) -> None:
    base, output = tmp_path / "base", tmp_path / "merged"
    pipeline.to(dtype).save_pretrained(base)
    assert merge(base, output, theirs) == len(theirs)
    before, after = load_file(base / UNET), load_file(output / UNET)
    for path, _ in pipeline.unet.named_modules():
        name, key = "lora_unet_" + path.replace(".", "_"), f"{path}.weight"
        if name in theirs:
            delta = update(theirs[name]).float().reshape(before[key].shape)
            assert torch.equal(after[key], (before[key].float() + delta).to(dtype))
        elif key in before:
            assert torch.equal(after[key], before[key])
    same = [file.relative_to(base) for file in base.rglob("*.*") if file.suffix != ".safetensors"]
    assert same
    assert all((output / file).read_bytes() == (base / file).read_bytes() for file in same)
    assert header_bytes(output / UNET) == header_bytes(base / UNET)
    StableDiffusionPipeline.from_pretrained(output)
    found, others = differ(output, base)
    assert (found.keys(), others) == (theirs.keys(), [])
    for name, weights in theirs.items():
        error = (found[name].double().flatten(1) - update(weights)).norm() / update(weights).norm()
        assert error < (1e-5 if dtype == torch.float32 else 0.02)


@torch.no_grad()
def test_loras_merged_into_memory_add_up_in_the_networks_that_are_wanted(pipeline: Any, tmp_path: Path) -> None:
    files = []
    for seed, weight in ((5, 0.5), (6, -1.5)):
        kohya_trainer(tmp_path / f"{seed}.safetensors", pipeline, text=True, conv=True, seed=seed)
        files.append((read_file(tmp_path / f"{seed}.safetensors"), weight))
    networks = {"unet": pipeline.unet, "text_encoder": pipeline.text_encoder}
    before = {name: {key: value.clone() for key, value in n.state_dict().items()} for name, n in networks.items()}
    merge_loras(files, networks, ["unet"])
    for key, value in pipeline.unet.state_dict().items():
        name, expected = "lora_unet_" + key.removesuffix(".weight").replace(".", "_"), before["unet"][key].double()
        for file, weight in files:
            if name in file.state and key.endswith(".weight"):
                expected = expected + weight * update(file.state[name]).view_as(expected)
        torch.testing.assert_close(value.double(), expected, atol=1e-6, rtol=0)
    assert all(torch.equal(v, before["text_encoder"][k]) for k, v in pipeline.text_encoder.state_dict().items())
    with pytest.raises(DataError, match=r"5\.safetensors.*'lora_te_"):
        merge_loras(files, {"unet": pipeline.unet}, ["unet"])


def test_refused_merge_leaves_no_folder(theirs: LoraState, tiny_base: Path, tmp_path: Path) -> None:
    name = next(iter(theirs))
    cases: list[tuple[LoraState, str]] = [
        ({**theirs, "lora_unet_nowhere": theirs[name]}, "tiny: 1 of its .*'lora_unet_nowhere'"),
        ({**theirs, name: LoraWeights(torch.ones(2, 5), torch.ones(4, 2), 1.0)}, "has the shape"),
    ]
    for state, reason in cases:
        with pytest.raises(DataError, match=reason):
            merge(tiny_base, tmp_path / "merged", state)
    torn = tmp_path / "torn"
    shutil.copytree(tiny_base, torn)
    (torn / UNET).write_bytes((tiny_base / UNET).read_bytes()[:-100])
    with pytest.raises(BaseModelError, match=r"diffusion_pytorch_model\.safetensors.*bytes"):
        merge(torn, tmp_path / "merged", theirs)
    (torn / "unet" / "model.bin").write_bytes(b"pickle")
    with pytest.raises(BaseModelError, match=r"model\.bin"):
        merge(torn, tmp_path / "merged", theirs)
    with pytest.raises(BaseModelError, match=r"model_index\.json"):
        merge(tiny_base / "unet", tmp_path / "merged", theirs)
    with pytest.raises(OutputError, match="torn"):
        merge(tiny_base, torn, theirs)
    with pytest.raises(OutputError, match="merged is inside"):
        merge(tiny_base, tiny_base / "merged", theirs)
    assert not [path for path in tmp_path.iterdir() if "merged" in path.name]


def test_differences_name_other_weights_and_refuse_other_architectures(tiny_base: Path, tmp_path: Path) -> None:
    tuned = tmp_path / "tuned"
    shutil.copytree(tiny_base, tuned)
    tensors = load_file(tuned / UNET)
    tensors["conv_norm_out.weight"] += 1
    tensors["conv_in.bias"] += 1
    tensors["conv_in.weight"] += 1
    save_file(tensors, tuned / UNET)
    found, others = differ(tuned, tiny_base)
    assert list(found) == ["lora_unet_conv_in"]
    assert set(others) == {"unet.conv_norm_out.weight", "unet.conv_in.bias"}
    save_file(tensors | {"conv_in.weight": torch.ones(3, 3)}, tuned / UNET)
    with pytest.raises(DataError, match=r"conv_in\.weight.*\(3, 3\)"):
        differ(tuned, tiny_base)
    save_file(tensors | {"more.weight": torch.ones(3, 3)}, tuned / UNET)
    with pytest.raises(DataError, match=r"more\.weight"):
        differ(tuned, tiny_base)


def test_merge_changes_every_variant_and_differences_need_one(pipeline: Any, theirs: LoraState, tmp_path: Path) -> None:
    base, output = tmp_path / "base", tmp_path / "merged"
    pipeline.save_pretrained(base)
    half = UNET.replace(".safetensors", ".fp16.safetensors")
    save_file({key: tensor.half() for key, tensor in load_file(base / UNET).items()}, base / half)
    merge(base, output, theirs)
    before, full, rounded = (load_file(file) for file in (base / UNET, output / UNET, output / half))
    assert any(not torch.equal(before[key], full[key]) for key in full)
    for key, tensor in full.items():
        torch.testing.assert_close(rounded[key].float(), tensor, atol=2e-3, rtol=2e-3)
    with pytest.raises(BaseModelError, match="twice"):
        differ(base, output)


def test_merge_overflow_is_refused(pipeline: Any, theirs: LoraState, tmp_path: Path) -> None:
    pipeline.to(torch.float16).save_pretrained(tmp_path / "base")
    large = {name: LoraWeights(w.down, w.up * 1e7, w.alpha) for name, w in theirs.items()}
    with pytest.raises(ExportError, match=r"float16.*--weights"):
        merge(tmp_path / "base", tmp_path / "merged", large)
    assert not (tmp_path / "merged").exists()


def test_merge_into_float8_is_refused(theirs: LoraState, tiny_base: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_base, tmp_path / "base")
    save_file({k: t.to(torch.float8_e4m3fn) for k, t in load_file(tiny_base / UNET).items()}, tmp_path / "base" / UNET)
    with pytest.raises(BaseModelError, match="F8_E4M3"):
        merge(tmp_path / "base", tmp_path / "merged", theirs)


def test_merge_updates_the_hash_of_the_tensors(theirs: LoraState, tiny_base: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_base, tmp_path / "base")
    metadata = {"modelspec.hash_sha256": "0x" + "0" * 64, "modelspec.title": "a base"}
    save_file(load_file(tiny_base / UNET), tmp_path / "base" / UNET, metadata=metadata)
    merge(tmp_path / "base", tmp_path / "merged", theirs)
    content, header = (tmp_path / "merged" / UNET).read_bytes(), header_bytes(tmp_path / "merged" / UNET)
    digest = hashlib.sha256(content[len(header) :]).hexdigest()
    assert header == header_bytes(tmp_path / "base" / UNET).replace(b"0" * 64, digest.encode())
