"""The tools for LoRA files through the real command line, compared with what diffusers and PEFT compute."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from helpers.adapters import UNET_TARGETS, injected
from helpers.command import call
from helpers.trainers import diffusers_script, kohya_trainer
from safetensors.torch import load_file, save_file

from sdlora.lora.inject import AdapterSpec
from sdlora.lora_files.write import LoraMetadata, add_metadata, save_lora

Capture = pytest.CaptureFixture[str]
METADATA = LoraMetadata("hero", "base", "stable-diffusion-v1", 64, "zumi", 3, 12, 1.7e9, {})


@pytest.fixture
def fresh(tiny_base: Path) -> Any:
    """Makes a pipeline as any diffusers user loads it."""
    return lambda folder=tiny_base: StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)


@torch.no_grad()
def predictions(pipeline: Any, *files: Path, weights: tuple[float, ...] = (1.0,)) -> tuple[torch.Tensor, torch.Tensor]:
    """The predictions of UNet and text encoder with LoRA files loaded through diffusers."""
    for index, file in enumerate(files):
        pipeline.load_lora_weights(file.parent, weight_name=file.name, adapter_name=f"lora{index}")
    if files:
        pipeline.set_adapters([f"lora{index}" for index in range(len(files))], list(weights))
    generator = torch.Generator().manual_seed(4)
    latents, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 77, 16, generator=generator)
    unet = pipeline.unet(latents, torch.tensor([10, 700]), text, return_dict=False)[0]
    tokens = torch.arange(2 * 77).reshape(2, 77) % pipeline.text_encoder.config.vocab_size
    return unet, pipeline.text_encoder(tokens).last_hidden_state


def distance(one: tuple[torch.Tensor, ...], other: tuple[torch.Tensor, ...]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True))


def made(tmp_path: Path, fresh: Any, kind: str) -> Path:
    """A LoRA file of some trainer."""
    file = tmp_path / f"{kind}.safetensors"
    if kind == "ours":
        state = injected(fresh(), [*UNET_TARGETS, "text_encoder"], AdapterSpec()).state()
        save_lora(file, state, metadata=METADATA)
    elif kind.startswith("script"):
        # diffusers drops parts of the text encoder from its own older names since transformers 5.
        diffusers_script(file, fresh(), text=kind == "script", old_names=kind == "script-old")
    else:
        kohya_trainer(file, fresh(), text=kind == "kohya-text", conv=kind == "kohya-text", dtype=torch.float16)
    return file


KINDS = ["ours", "script", "script-old", "kohya", "kohya-text"]


def run(capsys: Capture, *arguments: object) -> str:
    code, out, err = call(capsys, *map(str, arguments))
    assert code == 0, err
    return out


def refused(capsys: Capture, *arguments: object) -> tuple[int, str]:
    code, out, err = call(capsys, *map(str, arguments))
    assert out == ""
    assert "Traceback" not in err
    assert "Internal" not in err
    return code, " ".join(err.split())


@pytest.mark.parametrize("kind", KINDS)
def test_converted_files_predict_the_same_in_diffusers(
    kind: str, fresh: Any, tiny_base: Path, tmp_path: Path, capsys: Capture
) -> None:
    file, peft, back = made(tmp_path, fresh, kind), tmp_path / "peft.safetensors", tmp_path / "back.safetensors"
    run(capsys, "convert", file, peft, "--to", "peft", "--base", tiny_base)
    run(capsys, "convert", peft, back, "--to", "kohya")
    expected = predictions(fresh(), file)
    assert distance(expected, predictions(fresh())) > 1e-2
    assert distance(expected, predictions(fresh(), peft)) < 1e-6
    assert distance(expected, predictions(fresh(), back)) < 1e-6
    described = [json.loads(run(capsys, "info", f, "--json")) for f in (file, peft, back)]
    assert [d["names"] for d in described] == ["peft" if "script" in kind else "kohya", "peft", "kohya"]
    for key in ("ranks", "alphas", "modules", "dtype", "update_norm"):
        assert described[0][key] == described[1][key] == described[2][key], key


def test_info_shows_only_the_size_of_a_thumbnail(fresh: Any, tmp_path: Path, capsys: Capture) -> None:
    file = made(tmp_path, fresh, "ours")
    add_metadata(file, {"modelspec.thumbnail": "data:image/jpeg;base64," + "A" * 4000})
    out = run(capsys, "info", file)
    assert "modelspec.thumbnail: an image of 3017 bytes" in out
    assert "AAAA" not in out
    assert "A" * 4000 in run(capsys, "info", file, "--json")


def test_convert_rounds_to_the_given_precision(fresh: Any, tmp_path: Path, capsys: Capture) -> None:
    file, half, back = made(tmp_path, fresh, "ours"), tmp_path / "half.safetensors", tmp_path / "back.safetensors"
    assert "weights rounded to float16" in run(capsys, "convert", file, half, "--to", "kohya", "--precision", "fp16")
    assert "unchanged" in run(capsys, "convert", half, back, "--to", "kohya", "--precision", "fp32")
    original, rounded, again = (load_file(path) for path in (file, half, back))
    for key, tensor in original.items():
        expected = tensor if key.endswith(".alpha") else tensor.half()
        assert torch.equal(rounded[key], expected)
        assert torch.equal(again[key], expected.float())
        assert rounded[key].dtype == expected.dtype
    code, _, err = call(
        capsys, "convert", str(file), str(tmp_path / "x.safetensors"), "--to", "kohya", "--precision", "fp8"
    )
    assert (code, "fp16" in err) == (2, True)


@pytest.mark.parametrize("kind", KINDS)
def test_merge_of_one_lora_with_weight_1_is_bitwise_equal(
    kind: str, fresh: Any, tmp_path: Path, capsys: Capture
) -> None:
    file, merged, plain = made(tmp_path, fresh, kind), tmp_path / "merged.safetensors", tmp_path / "plain.safetensors"
    run(capsys, "merge", file, "--weights", "1", "--output", merged)
    run(capsys, "convert", file, plain, "--to", "kohya")
    before, after = load_file(plain), load_file(merged)
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert torch.equal(tensor, after[key])
        assert tensor.dtype == after[key].dtype
    original = load_file(file)
    assert all(torch.equal(before[key].float(), original[key].float()) for key in original if "script" not in kind)


@pytest.mark.parametrize("other", ["script", "script-old", "kohya-text"])
def test_merge_predicts_what_diffusers_adapters_add_up_to(
    other: str, fresh: Any, tiny_base: Path, tmp_path: Path, capsys: Capture
) -> None:
    files = [made(tmp_path, fresh, "ours"), made(tmp_path, fresh, other)]
    merged, cut, folder = tmp_path / "sum.safetensors", tmp_path / "cut.safetensors", tmp_path / "folder"
    out = run(capsys, "merge", *files, "--weights", "1", "-0.5", "--output", merged)
    assert "Exact" in out and "float32" in out
    expected = predictions(fresh(), *files, weights=(1.0, -0.5))
    assert distance(expected, predictions(fresh(), merged)) < 2e-5
    out = run(capsys, "merge", *files, "--weights", "1,-0.5", "--rank", "2", "--output", cut)
    assert "relative error" in out
    assert json.loads(run(capsys, "info", cut, "--json"))["ranks"] == [2]
    run(capsys, "merge", *files, "--weights", "1", "-0.5", "--into", tiny_base, "--output", folder)
    assert distance(expected, predictions(fresh(folder))) < 2e-5


@pytest.mark.parametrize("kind", KINDS)
def test_resize_to_full_rank_predicts_the_same(kind: str, fresh: Any, tmp_path: Path, capsys: Capture) -> None:
    file, full, half = (made(tmp_path, fresh, kind), tmp_path / "full.safetensors", tmp_path / "half.safetensors")
    assert "100.0000%" in run(capsys, "resize", file, full, "--rank", "4")
    expected = predictions(fresh(), file)
    scale = max(float(prediction.abs().max()) for prediction in expected)
    assert distance(expected, predictions(fresh(), full)) < 1e-6 * scale
    assert "energy" in run(capsys, "resize", file, half, "--energy", "0.5")
    assert max(json.loads(run(capsys, "info", half, "--json"))["ranks"]) < 4


@pytest.mark.parametrize("kind", KINDS)
def test_extract_recovers_a_lora_merged_into_a_base(
    kind: str, fresh: Any, tiny_base: Path, tmp_path: Path, capsys: Capture
) -> None:
    file, folder, out = made(tmp_path, fresh, kind), tmp_path / "folder", tmp_path / "out.safetensors"
    run(capsys, "merge", file, "--into", tiny_base, "--output", folder)
    said = run(capsys, "extract", folder, tiny_base, out, "--rank", "4")
    assert "Left out" not in said
    assert distance(predictions(fresh(), file), predictions(fresh(), out)) < 1e-3


def test_dora_converts_both_ways_and_is_refused_elsewhere(
    fresh: Any, tiny_base: Path, tmp_path: Path, capsys: Capture
) -> None:
    file, out = tmp_path / "dora.safetensors", tmp_path / "out.safetensors"
    diffusers_script(file, fresh(), use_dora=True)
    for arguments in (
        ["merge", file, "--output", out],
        ["merge", file, "--into", tiny_base, "--output", tmp_path / "folder"],
        ["resize", file, out, "--rank", "2"],
    ):
        code, err = refused(capsys, *arguments)
        assert (code, "DoRA" in err) == (3, True), err
    kohya = tmp_path / "kohya.safetensors"
    run(capsys, "convert", file, kohya, "--to", "kohya")
    assert {key.rpartition(".")[2] for key in load_file(kohya)} == {"weight", "alpha", "dora_scale"}
    run(capsys, "convert", kohya, out, "--to", "peft", "--base", tiny_base)
    assert distance(predictions(fresh(), file), predictions(fresh(), out)) < 1e-6


def test_convert_says_what_it_gave_and_left_out(fresh: Any, tiny_base: Path, tmp_path: Path, capsys: Capture) -> None:
    file, out = tmp_path / "untold.safetensors", tmp_path / "out.safetensors"
    diffusers_script(file, fresh(), told=False)
    told = run(capsys, "convert", file, out, "--to", "kohya", "--missing-alpha", "rank")
    assert "alphas set to rank in 32 modules" in told
    save_file(load_file(out), file, metadata={"ss_tag_frequency": "x" * (1 << 20)})
    out.unlink()
    told = run(capsys, "convert", file, out, "--to", "peft", "--base", tiny_base, "--peft-folder", tmp_path / "own")
    assert "alphas unchanged" in told and "Left out of the metadata" in told and "ss_tag_frequency" in told
    assert (tmp_path / "own/unet/adapter_config.json").is_file() and str(tmp_path / "own" / "unet") in told
    code, err = refused(capsys, "convert", file, tmp_path / "x.safetensors", "--to", "kohya", "--peft-folder", tmp_path)
    assert (code, "--to peft" in err) == (2, True)


def test_bad_input_has_a_message_and_an_exit_code_and_writes_nothing(
    fresh: Any, tiny_base: Path, tmp_path: Path, capsys: Capture
) -> None:
    hero, out = made(tmp_path, fresh, "kohya"), tmp_path / "out.safetensors"
    untold, wide, torn = (tmp_path / f"{name}.safetensors" for name in ("untold", "wide", "torn"))
    diffusers_script(untold, fresh(), told=False)
    key = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
    save_file({f"{key}.lora_down.weight": torch.ones(2, 2048), f"{key}.lora_up.weight": torch.ones(4, 2),
               f"{key}.alpha": torch.tensor(1.0)}, wide)  # fmt: skip
    torn.write_bytes(hero.read_bytes()[:-100])
    before = sorted(tmp_path.iterdir())
    cases: list[tuple[list[object], int, str]] = [
        (["convert", untold, out, "--to", "kohya"], 3, "--missing-alpha rank"),
        (["convert", torn, out, "--to", "kohya"], 3, "torn.safetensors"),
        (["convert", hero, out, "--to", "peft"], 3, "--base FOLDER"),
        (["convert", hero, hero, "--to", "kohya"], 2, "already exists"),
        (["convert", hero, tmp_path / "out.ckpt", "--to", "kohya"], 2, ".safetensors"),
        (["convert", hero, out, "--to", "kohya", "--base", tmp_path], 2, "unet/config.json"),
        (["merge", hero, wide, "--output", out], 3, "different families"),
        (["merge", hero, "--weights", "1", "2", "--output", out], 2, "2 numbers for 1 files"),
        (["merge", hero, "--weights", "--output", out], 2, "0 numbers"),
        (["merge", hero, "--weights", "much", "--output", out], 2, "'much'"),
        (["merge", hero, "--weights", "1e999", "--output", out], 2, "finite"),
        (["merge", hero, "--into", tiny_base, "--rank", "2", "--output", tmp_path / "x"], 2, "--into"),
        (["merge", wide, "--into", tiny_base, "--output", tmp_path / "x"], 3, "has the shape"),
        (["resize", hero, out], 2, "either --rank N or --energy"),
        (["resize", hero, out, "--energy", "2"], 2, "found 2"),
        (["extract", tiny_base, tiny_base, out, "--rank", "4"], 3, "same weights"),
        (["extract", tmp_path, tiny_base, out, "--rank", "4"], 2, "model_index.json"),
    ]
    for arguments, code, reason in cases:
        found, err = refused(capsys, *arguments)
        assert (found, reason in err) == (code, True), (arguments, found, err)
        assert sorted(tmp_path.iterdir()) == before, arguments


def test_missing_alpha_rank_is_what_diffusers_assumes(fresh: Any, tmp_path: Path, capsys: Capture) -> None:
    untold, out = tmp_path / "untold.safetensors", tmp_path / "out.safetensors"
    diffusers_script(untold, fresh(), told=False, lora_alpha=4)
    run(capsys, "convert", untold, out, "--to", "kohya", "--missing-alpha", "rank")
    assert distance(predictions(fresh(), untold), predictions(fresh(), out)) < 1e-6
    assert "not in the file" in run(capsys, "info", untold)


def test_help_does_not_import_torch() -> None:
    script = (
        "import sys; from sdlora.cli import main as cli; sys.argv = ['sdlora', '--help']\n"
        "try: cli.main()\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'diffusers'} & set(sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    assert all(command in shown for command in ("train", "info", "convert", "merge", "resize", "extract"))
