"""What someone new does: a folder as kohya's trainer wants it, an SDXL checkpoint in one file, no edited file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.ldm import authors_layout, write_checkpoint
from helpers.tiny import REDUCED_SDXL, random_networks
from typer.testing import CliRunner, Result

from sdlora.cli.main import app
from sdlora.config.toml import dump_toml, load_config, options
from sdlora.pocket.world import random_scene, render
from sdlora.ui.settings.draft import Draft
from sdlora.ui.state.folders import Studio

SMALL = ("data.resolution_px=64", "data.bucket_step_px=8", "train.exposures=1", "train.epochs=1", "train.device=cpu")


def call(*words: str, code: int = 0) -> Result:
    found = CliRunner().invoke(app, words)
    assert found.exit_code == code, found.output
    return found


def with_sets(*values: str) -> list[str]:
    return [part for value in values for part in ("--set", value)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A smaller SDXL in its authors' layout; nothing says how large it is but its tensors."""
    file = tmp_path_factory.mktemp("base") / "sdxl-small.safetensors"
    write_checkpoint(file, authors_layout("sdxl", random_networks(REDUCED_SDXL)))
    return file


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Twenty images of one subject as kohya's trainer wants them."""
    folder = tmp_path / "images" / "10_zumi creature"
    folder.mkdir(parents=True)
    for index in range(20):
        render(random_scene(index)).resize((64, 80 if index % 2 else 64)).save(folder / f"{index:02}.png")
        (folder / f"{index:02}.caption").write_text(f"zumi, scene {index}", encoding="utf-8")
    return tmp_path / "images"


def check_proven(run: Path) -> None:
    assert json.loads((run / "epochs" / "1" / "proof.json").read_text())["max_error"] < 1e-3
    assert json.loads((run / "state.json").read_text())["status"] == "done"
    assert len(list((run / "epochs" / "1" / "previews").glob("*.png"))) >= 6


@pytest.mark.slow
def test_kohyas_folder_becomes_a_checked_lora_in_three_commands(tmp_path: Path, images: Path, checkpoint: Path) -> None:
    told = json.loads(call("data", str(images), "--json").stdout)
    assert told["pictures"] == 20 and not told["findings"]

    run, cache = tmp_path / "run", f"cache.dir={tmp_path / 'cache'}"
    given = [f"base.path={checkpoint}", f"data.folder={images}", "data.trigger=zumi", "preview.num_steps=1"]
    call("train", "sdxl-character", *with_sets(*given, *SMALL, cache), "--output", str(run))
    check_proven(run)

    checked = call(
        "check", str(run / "sdxl-character.safetensors"), "--data", str(images), "--base", str(checkpoint), "--json",
        "--output", str(tmp_path / "check"), *with_sets("preview.num_steps=1", cache, *SMALL[:2]),
    )  # fmt: skip
    assert json.loads(checked.stdout)["verdict"] in ("clean", "watch")


@pytest.mark.slow
def test_the_studios_answers_train_the_same_file_in_one_piece(tmp_path: Path, images: Path, checkpoint: Path) -> None:
    studio = Studio(tmp_path / "runs", any_folder=True)
    draft = Draft().with_images(str(images)).with_answers("character", "as usual", str(checkpoint))
    config = draft.with_value("data.trigger", "zumi").config(studio)
    sets = [f"base.path={checkpoint}", f"data.folder={images}", "data.trigger=zumi", f"name={config.name}"]
    assert dict(options(config)) == dict(options(load_config("sdxl-character", sets)))
    # The queue writes it into a file and trains that.
    file = tmp_path / "job.toml"
    file.write_text(dump_toml(config), encoding="utf-8")
    small = [f"cache.dir={tmp_path / 'cache'}", "preview.num_steps=1", "data.repeats=1", *SMALL]
    call("train", str(file), *with_sets(*small), "--output", str(tmp_path / "run"))
    check_proven(tmp_path / "run")
