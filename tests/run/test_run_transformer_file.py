"""The whole chain on a transformer in one file: trained, proven, checked for copies, estimated."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.command import call
from helpers.runs import digests, run
from helpers.tiny import WHOLE_HEADS, make_tiny_z_image
from helpers.transformer_files import in_fp8, weights_of, write, z_image

from sdlora.cli.check import EXIT_COPYING
from sdlora.events import Exported


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("base") / "z-image"
    make_tiny_z_image(place, **WHOLE_HEADS)
    return place


@pytest.mark.slow
def test_file_trains_as_its_folder_and_passes_all_commands(
    folder: Path, images: Path, overrides: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "z.safetensors", z_image(weights_of(folder)), prefix="model.diffusion_model.")
    small = ['lora.targets=["attention"]', "train.epochs=1", "preview.guidance=3"]
    parts = [f"base.path={file}", f"base.components={folder}"]
    runs = {}
    for name, base in {"file": parts, "folder": [f"base.path={folder}"]}.items():
        (tmp_path / name).mkdir()
        events = run(tmp_path / name / "run", [*overrides, *base, *small])
        (exported,) = (event for event in events if isinstance(event, Exported))
        assert (exported.max_error, exported.num_modules) == (0.0, 8)
        runs[name] = digests(tmp_path / name / "run")
    assert runs["file"] == runs["folder"]
    settings = ["data.resolution_px=32", "preview.num_steps=1", "train.precision=fp32", f"cache.dir={tmp_path / 'c'}"]
    settings.append(f"base.components={folder}")
    given = [part for setting in settings for part in ("--set", setting)]
    lora = str(tmp_path / "file" / "run" / "hero.safetensors")
    code, out, err = call(
        capsys, "check", lora, "--data", str(images), "--base", str(file), *given, "--output", str(tmp_path / "o"),
        "--json",
    )  # fmt: skip
    assert code in (0, EXIT_COPYING), err
    assert json.loads(out)["previews"]
    changed = [part for setting in [*overrides, *parts, *small] for part in ("--set", setting)]
    code, out, err = call(capsys, "plan", str(tmp_path / "file" / "hero.toml"), *changed, "--json")
    assert code == 0, err
    assert json.loads(out)["peak_bytes"] > 0


def test_file_in_8_bits_trains_to_a_proven_file(folder: Path, overrides: list[str], tmp_path: Path) -> None:
    file = write(tmp_path / "z_fp8.safetensors", in_fp8(z_image(weights_of(folder))))
    options = [f"base.path={file}", f"base.components={folder}", 'lora.targets=["attention"]', "preview.enabled=false"]
    events = run(tmp_path / "run", [*overrides, *options, "train.epochs=1"])
    assert [event.max_error for event in events if isinstance(event, Exported)] == [0.0]
