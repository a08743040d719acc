"""Files of earlier versions load; those of later ones are refused with the version's name."""

from __future__ import annotations

import functools
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from helpers.fixtures import FIXTURES
from helpers.promises import Figure
from helpers.scene import Scene
from safetensors.torch import load_file

from sdlora.common.run_files import read_metrics
from sdlora.config.toml import RENAMED, load_config, renaming_note
from sdlora.errors import OutputError
from sdlora.lora_files.read import describe_lora, read_tensors
from sdlora.lora_files.write import tensors_sha256
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


def test_run_with_earlier_option_names_resumes_to_the_end_with_warnings(scene: Scene, tmp_path: Path) -> None:
    run = shutil.copytree(FIXTURES / "0.1.0" / "run", tmp_path / "run")
    arguments = ["train", str(run / "config.toml"), "--output", str(run), "--set", f"cache.dir={scene.cache}"]
    outcome = scene.command.run(*arguments, "--resume", prepare=functools.partial(os.chdir, scene.root))
    assert outcome.code == 0, outcome.err
    for name in RENAMED:
        assert outcome.err.count(renaming_note(name)) == 1
    metrics = read_metrics(run / "metrics.jsonl")
    assert [step.step for step in metrics.steps] == list(range(1, 11))
    assert [epoch.epoch for epoch in metrics.epochs] == [0, 1, 2]
    # The uninterrupted run of the version that wrote it ended in these tensors.
    _, metadata = read_tensors(run / "hero.safetensors")
    assert metadata["sshs_model_hash"] == "9c151c3817b7e2816ae698f893fbbe23e45adc579374ba00de5a07f842fd6099"


def test_a_checkpoint_of_a_later_version_is_refused_with_its_name(scene: Scene, tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / VERSIONS[-1] / "checkpoint", tmp_path / "checkpoint")
    counters = tmp_path / "checkpoint" / "complete.json"
    content = json.loads(counters.read_text(encoding="utf-8"))
    counters.write_text(json.dumps({**content, "format": 99, "version": "9.8.7"}), encoding="utf-8")
    parts = prepare(load_config(str(scene.config), [f"cache.dir={scene.cache}"]), RunFolder(tmp_path, "hero"))
    with pytest.raises(OutputError, match=r"written by sdlora 9\.8\.7, in a format \(number 99\)"):
        load_checkpoint(tmp_path / "checkpoint", parts.trainer)
    counters.write_text("{half", encoding="utf-8")
    with pytest.raises(OutputError, match=r"checkpoint is damaged"):
        load_checkpoint(tmp_path / "checkpoint", parts.trainer)
