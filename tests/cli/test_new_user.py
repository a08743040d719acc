"""What someone new does: a folder as kohya's trainer wants it, an SDXL base model, three commands, no edited file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.tiny import make_tiny
from typer.testing import CliRunner, Result

from sdlora.cli.main import app
from sdlora.pocket.world import random_scene, render


def call(*words: str, code: int = 0) -> Result:
    found = CliRunner().invoke(app, words)
    assert found.exit_code == code, found.output
    return found


@pytest.mark.slow
def test_kohyas_folder_becomes_a_checked_lora_in_three_commands(tmp_path: Path) -> None:
    make_tiny("sdxl", tmp_path / "base")
    folder = tmp_path / "images" / "10_zumi creature"
    folder.mkdir(parents=True)
    for index in range(20):
        render(random_scene(index)).resize((64, 80 if index % 2 else 64)).save(folder / f"{index:02}.png")
        (folder / f"{index:02}.caption").write_text(f"zumi, scene {index}", encoding="utf-8")
    images, run = str(tmp_path / "images"), tmp_path / "run"

    told = json.loads(call("data", images, "--json").stdout)
    assert told["pictures"] == 20 and not told["findings"]

    small = [
        "data.resolution_px=64",
        "data.bucket_step_px=8",
        "train.exposures=1",
        "train.epochs=1",
        "train.device=cpu",
    ]
    given = [f"base.path={tmp_path / 'base'}", f"data.folder={images}", "data.trigger=zumi", "preview.num_steps=1"]
    sets = [part for value in [*given, *small, f"cache.dir={tmp_path / 'cache'}"] for part in ("--set", value)]
    call("train", "sdxl-character", *sets, "--output", str(run))
    lora = run / "sdxl-character.safetensors"
    assert json.loads((run / "epochs" / "1" / "proof.json").read_text())["max_error"] < 1e-3
    state = json.loads((run / "state.json").read_text())
    assert state["status"] == "done"
    previews = list((run / "epochs" / "1" / "previews").glob("*.png"))
    assert len(previews) >= 6

    settings = ["preview.num_steps=1", f"cache.dir={tmp_path / 'cache'}", *small[:2]]
    overrides = [part for value in settings for part in ("--set", value)]
    checked = call(
        "check", str(lora), "--data", images, "--base", str(tmp_path / "base"), "--json",
        "--output", str(tmp_path / "check"), *overrides,
    )  # fmt: skip
    assert json.loads(checked.stdout)["verdict"] in ("clean", "watch")
