"""Previews by a distilled sibling, and a training adapter: what is drawn, what is trained, what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ZImagePipeline
from helpers.runs import digests, metrics, run
from helpers.tiny import WHOLE_HEADS, make_tiny_klein, make_tiny_z_image
from helpers.transformer_files import weights_of, write, z_image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sdlora.config.toml import parse_config
from sdlora.errors import ConfigError, SdloraError
from sdlora.estimate.meta_model import shapes_of_family
from sdlora.events import Exported, Notice
from sdlora.models import sibling as sibling_module
from sdlora.models.base import BaseModel
from sdlora.models.families import CLASSES
from sdlora.run.estimate import estimate_config, estimate_shapes
from sdlora.run.run import Stopped


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("base") / "z-image"
    make_tiny_z_image(place, **WHOLE_HEADS)
    return place


@pytest.fixture(scope="module")
def turbo(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another transformer beside the same VAE and text encoder."""
    place, other = (tmp_path_factory.mktemp("sibling") / name for name in ("Z-Image-Turbo", "other"))
    make_tiny_z_image(other, seed=1, **WHOLE_HEADS)
    shutil.copytree(folder, place)
    shutil.rmtree(place / "transformer")
    shutil.copytree(other / "transformer", place / "transformer")
    return place


@pytest.fixture
def options(overrides: list[str], folder: Path) -> list[str]:
    kept = [option for option in overrides if not option.startswith("preview.num_steps")]
    small = ['lora.targets=["attention"]', "train.epochs=1", "train.learning_rate=1e-2", "file.thumbnail=false"]
    # What a preset says for the base model itself, which the sibling's settings take the place of.
    return [*kept, f"base.path={folder}", *small, "preview.num_steps=15", "preview.guidance=4"]


def lora_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "hero.safetensors")


def test_previews_are_those_of_the_sibling_with_the_lora(options: list[str], turbo: Path, tmp_path: Path) -> None:
    events = run(tmp_path / "run", [*options, f"preview.base={turbo}", "copycheck.enabled=true"])
    assert any("8 steps, without guidance" in event.message for event in events if isinstance(event, Notice))
    assert [event.max_error for event in events if isinstance(event, Exported)] == [0.0]
    theirs = ZImagePipeline.from_pretrained(turbo)
    theirs.load_lora_weights(tmp_path / "run" / "hero.safetensors")
    theirs.set_progress_bar_config(disable=True)
    for epoch in (0, 1):
        (theirs.enable_lora if epoch else theirs.disable_lora)()
        image = theirs(
            "a red ball", height=32, width=32, num_inference_steps=8, guidance_scale=0,
            generator=torch.Generator("cpu").manual_seed(0),
        ).images[0]  # fmt: skip
        (file,) = (tmp_path / "run" / "epochs" / str(epoch) / "previews").glob("*.png")
        assert image.tobytes() == open_image(file)
    checked = json.loads((tmp_path / "run" / "epochs" / "1" / "copycheck.json").read_text())
    assert all(preview.get("guidance_norm") is None for preview in checked["previews"])


def open_image(file: Path) -> bytes:
    from PIL import Image

    return Image.open(file).convert("RGB").tobytes()


@pytest.mark.slow
def test_the_lora_is_the_same_with_and_without_and_when_resumed(
    options: list[str], turbo: Path, tmp_path: Path
) -> None:
    for name in ("plain", "drawn", "cut"):
        (tmp_path / name).mkdir()
    by_sibling = [f"preview.base={turbo}", "preview.base_steps=2", "train.epochs=2", "train.checkpoint_every_steps=1"]
    run(tmp_path / "plain" / "run", [*options, "train.epochs=2", "preview.enabled=false"])
    run(tmp_path / "drawn" / "run", [*options, *by_sibling])
    asked = iter(range(10_000))
    with pytest.raises(Stopped):
        run(tmp_path / "cut" / "run", [*options, *by_sibling], should_stop=lambda: next(asked) > 14)
    assert len(metrics(tmp_path / "cut" / "run")) > 0
    run(tmp_path / "cut" / "run", [*options, *by_sibling], resume=True)
    assert digests(tmp_path / "cut" / "run") == digests(tmp_path / "drawn" / "run")
    plain, drawn = lora_of(tmp_path / "plain" / "run"), lora_of(tmp_path / "drawn" / "run")
    assert plain.keys() == drawn.keys()
    assert all(torch.equal(tensor, drawn[name]) for name, tensor in plain.items())


def test_sibling_may_be_one_file_and_its_blocks_may_wait(options: list[str], turbo: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "z_image_turbo.safetensors", z_image(weights_of(turbo)))
    found, by_folder = [], [f"preview.base={turbo}"]
    for number, more in enumerate(([f"preview.base={file}"], by_folder, [*by_folder, "base.offload=blocks"])):
        place = tmp_path / str(number)
        place.mkdir()
        run(place / "run", [*options, "preview.base_steps=1", *more])
        found.append(digests(place / "run"))
    assert found[0] == found[1] == found[2]


def test_one_of_both_networks_is_on_the_device_at_a_time(
    options: list[str], turbo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str]] = []
    names: dict[int, str] = {}
    real = sibling_module.load_sibling

    def load(path: str, base: BaseModel, **given: Any) -> Any:
        parts = real(path, base, **given)
        names.update({id(base.network): "trained", id(parts.network): "sibling"})
        return parts

    def move(network: Any, device: torch.device) -> None:
        if id(network) in names:
            asked.append((names[id(network)], "aside" if device is aside else "device"))

    aside = torch.device("cpu", 0)
    monkeypatch.setattr("sdlora.run.setup.load_sibling", load)
    monkeypatch.setattr("sdlora.models.base._ASIDE", aside)
    monkeypatch.setattr("sdlora.models.base.move", move)
    run(tmp_path / "run", [*options, f"preview.base={turbo}", "preview.base_steps=1"])
    there = {"trained"}
    for name, place in asked:
        (there.add if place == "device" else there.discard)(name)
        assert len(there) < 2, asked
    assert ("sibling", "device") in asked
    assert there == {"trained"}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["z-image", "flux2-klein-4b", "flux2-klein-9b"])
def test_a_preview_costs_at_most_three_training_steps(family: Any) -> None:
    config = parse_config(
        {"data": {"folder": "none", "resolution_px": 1024}, "lora": {"targets": ["attention"]},
         "train": {"gradient_checkpointing": True}}, name="x",
    )  # fmt: skip
    found = estimate_shapes(config, shapes_of_family(family), None)
    steps = CLASSES[family].few_steps
    assert steps is not None
    assert steps * found.flops_per_prediction + found.flops_per_decoding <= 3 * found.flops_per_step


@pytest.mark.slow
def test_estimate_counts_the_siblings_steps_and_memory(options: list[str], turbo: Path, images: Path) -> None:
    def estimate(*more: str) -> Any:
        given = dict(option.split("=", 1) for option in [*options, *more])
        return estimate_config(parse_config({}, name="x", overrides=[f"{k}={v}" for k, v in given.items()]), 2**40)

    plain, drawn = estimate(), estimate(f"preview.base={turbo}")
    assert plain.looking_share > 3 * drawn.looking_share
    two = drawn.parts["weights"] - plain.parts["weights"]
    assert two == sum(tensor.nbytes for tensor in weights_of(turbo).values())


def test_siblings_that_do_not_fit_are_refused(
    options: list[str], folder: Path, tiny_base: Path, tmp_path: Path
) -> None:
    def refused(path: Path | str, *more: str) -> str:
        with pytest.raises(SdloraError) as caught:
            run(tmp_path / "run", [*options, f"preview.base={path}", *more])
        assert not (tmp_path / "run").exists()
        return str(caught.value)

    assert "was not found" in refused("nowhere")
    make_tiny_klein(tmp_path / "klein")
    assert "FLUX.2 klein 4B, and the base model is Z-Image" in refused(tmp_path / "klein")
    assert "Stable Diffusion 1.x" in refused(tiny_base)
    make_tiny_z_image(tmp_path / "wide", n_layers=3, **WHOLE_HEADS)
    assert "another shape" in refused(tmp_path / "wide")
    assert "families with a distilled model" in refused(folder, f"base.path={tiny_base}", 'lora.targets=["mlp"]')
    with pytest.raises(ConfigError, match=r"no effect without preview\.base"):
        parse_config({"preview": {"base_steps": 4}, "data": {"folder": "x"}}, name="x")


def test_training_adapter_is_merged_while_training_and_left_out_of_previews(
    options: list[str], turbo: Path, tmp_path: Path
) -> None:
    draw = torch.Generator().manual_seed(3)
    path = "diffusion_model.layers.0.attention.to_q"
    down, up = torch.randn(4, 128, generator=draw), torch.randn(128, 4, generator=draw) * 0.2
    save_file({f"{path}.lora_A.weight": down, f"{path}.lora_B.weight": up}, tmp_path / "adapter.safetensors")
    on_turbo = [*options, f"base.path={turbo}", "preview.base_steps=2"]
    with pytest.raises(SdloraError, match="distilled"):
        run(tmp_path / "run", [*options, f"base.path={turbo}"])
    named = f"base.training_adapter={tmp_path / 'adapter.safetensors'}"
    events = run(tmp_path / "run", [*on_turbo, named])
    assert any("adapter.safetensors was merged" in event.message for event in events if isinstance(event, Notice))
    # The same with the adapter in the base model's own weights, and the unmerged model as the sibling.
    merged = tmp_path / "merged"
    shutil.copytree(turbo, merged)
    file = merged / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["layers.0.attention.to_q.weight"] += up @ down
    save_file(weights, file, metadata={"format": "pt"})
    (tmp_path / "b").mkdir()
    run(tmp_path / "b" / "run", [*on_turbo, f"base.path={merged}", f"preview.base={turbo}"])
    mine, theirs = lora_of(tmp_path / "run"), lora_of(tmp_path / "b" / "run")
    assert all(torch.allclose(tensor, theirs[name], atol=1e-5) for name, tensor in mine.items())
    previews = [*(tmp_path / "run" / "epochs" / "0" / "previews").glob("*.png")]
    assert open_image(previews[0]) == open_image(tmp_path / "b" / "run" / previews[0].relative_to(tmp_path / "run"))
    with safe_open(tmp_path / "run" / "hero.safetensors", framework="pt") as opened:
        assert json.loads(opened.metadata()["sdlora.training_adapter"])["file"] == "adapter.safetensors"
