"""A run on every family: it ends with its proof, and the file says what family it is for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.tiny import make_tiny
from safetensors import safe_open

from sdlora.common.families import Family
from sdlora.config.toml import load_config
from sdlora.errors import DataError
from sdlora.events import EpochDone, Exported, Notice
from sdlora.lora_files.read import describe_lora
from sdlora.run.run import start

TARGETS = ["cross_attention", "self_attention", "mlp", "projection", "conv", "text_encoder"]
SAID: dict[Family, dict[str, str]] = {
    "sd1": {
        "modelspec.architecture": "stable-diffusion-v1/lora", "modelspec.prediction_type": "epsilon",
        "ss_base_model_version": "sd_v1", "ss_v2": "False",
    },
    "sd2": {
        "modelspec.architecture": "stable-diffusion-v2-768-v/lora", "modelspec.prediction_type": "v",
        "ss_base_model_version": "sd_v2_v", "ss_v2": "True",
    },
    "sdxl": {
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora", "modelspec.prediction_type": "epsilon",
        "ss_base_model_version": "sdxl_base_v1-0", "ss_v2": "False",
    },
}  # fmt: skip
TEXT: dict[Family, set[str]] = {"sd1": {"lora_te_"}, "sd2": {"lora_te_"}, "sdxl": {"lora_te1_", "lora_te2_"}}


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_a_run_ends_with_its_proof(
    family: Family, tmp_path: Path, overrides: list[str], others: Path, images: Path
) -> None:
    make_tiny(family, tmp_path / "base")
    source = tmp_path / "hero.toml"
    source.write_text('[data]\ntrigger = "zumi"\nclass_words = ["cat"]\n[train]\npreservation_weight = 1.0\n')
    options = [
        *overrides, f"base.path={tmp_path / 'base'}", f"lora.targets={json.dumps(TARGETS)}", "train.epochs=1",
        f"data.validation_folder={others}", "data.max_token_windows=2", "copycheck.enabled=true", "lora.alpha=2",
        "preview.num_captions=1", "preview.guidance=2",
    ]  # fmt: skip
    events = list(start(load_config(str(source), options), tmp_path / "run"))
    exported = next(event for event in events if isinstance(event, Exported))
    assert exported.max_error == 0.0
    epochs = [event for event in events if isinstance(event, EpochDone)]
    assert all(event.validation_loss is not None and event.validation_loss > 0 for event in epochs)
    assert (tmp_path / "run" / "epochs" / "1" / "copycheck.json").exists()
    file = tmp_path / "run" / "hero.safetensors"
    with safe_open(file, framework="pt") as opened:
        metadata, keys = opened.metadata(), list(opened.keys())
    assert SAID[family].items() <= metadata.items()
    assert {key.partition("text_model")[0] for key in keys if key.startswith("lora_te")} == TEXT[family]
    described = describe_lora(file)
    assert set(described["modules"]) == set(TARGETS)
    assert described["alphas"] == [2.0]


def losses(base: Path, folder: Path, overrides: list[str], *more: str) -> list[EpochDone]:
    source = folder.parent / "hero.toml"
    source.write_text("[data]\ntrigger = 'zumi'\n")
    options = [*overrides, f"base.path={base}", "preview.enabled=false", "train.epochs=1", *more]
    return [event for event in start(load_config(str(source), options), folder) if isinstance(event, EpochDone)]


def test_sdxl_is_told_each_image_s_own_size(tmp_path: Path, overrides: list[str], others: Path) -> None:
    """The same pixels from a larger original are another condition, in training and in the validation loss."""
    from PIL import Image

    make_tiny("sdxl", tmp_path / "base")
    found = []
    for scale in (1, 3):
        folder = tmp_path / f"set{scale}"
        folder.mkdir()
        Image.new("RGB", (32 * scale, 32 * scale), "red").save(folder / "a.png")
        (folder / "a.txt").write_text("a red square")
        options = [*overrides, f"data.folder={folder}", f"data.validation_folder={folder.parent / 'others'}"]
        (folder.parent / "others").mkdir(exist_ok=True)
        Image.new("RGB", (32 * scale, 32 * scale), "blue").save(folder.parent / "others" / "b.png")
        (folder.parent / "others" / "b.txt").write_text("a blue square")
        found.append(losses(tmp_path / "base", tmp_path / f"run{scale}", options)[-1])
    assert found[0].train_loss != found[1].train_loss
    assert found[0].validation_loss != found[1].validation_loss


def test_text_states_of_both_encoders_are_trained_or_read_from_the_cache(tmp_path: Path, overrides: list[str]) -> None:
    make_tiny("sdxl", tmp_path / "base")
    losses(tmp_path / "base", tmp_path / "run", overrides)
    cached = list((tmp_path / "cache" / "text").glob("*/*.safetensors"))
    with safe_open(cached[0], framework="pt") as opened:
        assert set(opened.keys()) == {"states", "pooled"}
    trained = losses(tmp_path / "base", tmp_path / "other", overrides, 'lora.targets=["text_encoder"]')
    assert trained[-1].train_loss is not None
    (file,) = (tmp_path / "other").glob("*.safetensors")
    with safe_open(file, framework="pt") as opened:
        for mark in ("lora_te1_", "lora_te2_"):
            ups = [opened.get_tensor(key) for key in opened.keys() if key.startswith(mark) and "lora_up" in key]  # noqa: SIM118
            assert any(bool(up.any()) for up in ups), mark


@pytest.mark.parametrize("call", ["embedding:zumi", "<lora:zumi:0.8>", "<hypernet:x:1>"])
def test_captions_that_call_up_other_files_are_refused(
    call: str, tmp_path: Path, overrides: list[str], tiny_base: Path
) -> None:
    from PIL import Image

    folder = tmp_path / "set"
    folder.mkdir()
    Image.new("RGB", (32, 32)).save(folder / "a.png")
    (folder / "a.txt").write_text(f"a cat, {call}")
    with pytest.raises(DataError, match="textual inversion") as caught:
        losses(tiny_base, tmp_path / "run", [*overrides, f"data.folder={folder}"])
    assert f"a.png: {call}" in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_long_caption_is_told_with_what_to_do(tmp_path: Path, overrides: list[str], tiny_base: Path) -> None:
    from PIL import Image

    folder = tmp_path / "set"
    folder.mkdir()
    Image.new("RGB", (32, 32)).save(folder / "a.png")
    (folder / "a.txt").write_text("cat " * 100)

    def notices(*more: str) -> str:
        source = tmp_path / "hero.toml"
        source.write_text("[data]\ntrigger = 'zumi'\n")
        options = [*overrides, f"data.folder={folder}", "preview.enabled=false", "train.epochs=1", *more]
        config, name = load_config(str(source), options), f"run{len(more)}"
        events = start(config, tmp_path / name)
        return " ".join(event.message for event in events if isinstance(event, Notice))

    found = notices()
    assert all(fact in found for fact in ("longer than 77 tokens", "a.png", "data.max_token_windows"))
    assert "longer than" not in notices("data.max_token_windows=2")
