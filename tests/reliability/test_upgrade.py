"""Files of earlier versions load; those of later ones are refused with the version's name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.fixtures import FIXTURES
from helpers.promises import Figure
from helpers.scene import Scene
from safetensors.torch import load_file

from sdlora.config.toml import load_config
from sdlora.errors import OutputError
from sdlora.lora_files.read import read_tensors, tensors_sha256
from sdlora.lora_files.write import describe_lora
from sdlora.run.folder import RunFolder
from sdlora.run.setup import prepare
from sdlora.training.checkpoint import load_checkpoint

VERSIONS = sorted(path.name for path in FIXTURES.iterdir())


def test_files_of_every_version_are_read(scene: Scene, tmp_path: Path, figure: Figure) -> None:
    for version in VERSIONS:
        parts = prepare(load_config(str(scene.config), [f"cache.dir={scene.cache}"]), RunFolder(tmp_path, "hero"))
        checkpoint = FIXTURES / version / "checkpoint"
        load_checkpoint(checkpoint, parts.trainer)
        saved = load_file(checkpoint / "state.safetensors")
        assert parts.trainer.position.step == 10
        for index, parameter in enumerate(parts.trainer.adapter.parameters()):
            assert torch.equal(parameter, saved[f"parameter.{index}"])
        tensors, metadata = read_tensors(FIXTURES / version / "hero.safetensors")
        assert metadata["sshs_model_hash"] == tensors_sha256(tensors)
        told = describe_lora(FIXTURES / version / "hero.safetensors")
        assert (told["trigger"], told["ranks"], told["alphas"]) == ("zumi", [2], [2.0])
        assert metadata["sdlora.version"] == version
    figure("Upgrade", f"files of {', '.join(VERSIONS)} read; later ones refused by name")


def test_a_checkpoint_of_a_later_version_is_refused_with_its_name(scene: Scene, tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / VERSIONS[-1] / "checkpoint", tmp_path / "checkpoint")
    counters = tmp_path / "checkpoint" / "complete.json"
    content = json.loads(counters.read_text(encoding="utf-8"))
    counters.write_text(json.dumps({**content, "format": 99, "version": "9.8.7"}), encoding="utf-8")
    parts = prepare(load_config(str(scene.config), [f"cache.dir={scene.cache}"]), RunFolder(tmp_path, "hero"))
    with pytest.raises(OutputError, match=r"written by sdlora 9\.8\.7, in a format \(number 99\)"):
        load_checkpoint(tmp_path / "checkpoint", parts.trainer)
    counters.write_text("{half", encoding="utf-8")
    with pytest.raises(OutputError, match=r"is damaged .* go on from the one before it"):
        load_checkpoint(tmp_path / "checkpoint", parts.trainer)
