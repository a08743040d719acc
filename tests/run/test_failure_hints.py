"""What a run's error messages add: the stage's hints, and the last good epoch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from sdlora.config.toml import load_config
from sdlora.errors import OutOfMemoryError
from sdlora.run.failure_hints import diverged_message
from sdlora.run.folder import RunFolder
from sdlora.run.run import start


def full(*_: object, **__: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory.")


@pytest.mark.parametrize(
    ("function", "told"),
    [
        ("sdlora.run.run.prepare", "base.quantization = 'int8'"),
        ("sdlora.cache.tensors.Cache.fill_moments", "data.resolution_px = 24 (now 32"),
        ("sdlora.training.loss.diffusion_loss", "--resume --set train.auto_batch=true"),
        ("sdlora.run.epoch.export_epoch", "base.quantization = 'int8'"),
        ("sdlora.previews.sampler._draw", "--resume --set preview.enabled=false"),
        ("sdlora.training.validation.diffusion_loss", "--resume --set train.auto_batch=true"),
    ],
)
def test_out_of_memory_in_a_stage_gives_its_hints(
    function: str, told: str, tmp_path: Path, overrides: list[str], others: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "hero.toml"
    source.write_text("", encoding="utf-8")
    config = load_config(str(source), [*overrides, "train.epochs=1", f"data.validation_folder={others}"])
    monkeypatch.setattr(function, full)
    with pytest.raises(OutOfMemoryError) as caught:
        list(start(config, tmp_path / "run"))
    assert told in str(caught.value)
    if function != "sdlora.run.run.prepare":
        state = json.loads((tmp_path / "run" / "state.json").read_text())
        assert (state["status"], state["error"]) == ("failed", str(caught.value))
        assert "CUDA out of memory." in (tmp_path / "run" / "log.txt").read_text()


def test_diverged_message_names_the_last_good_epoch(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, "hero")
    assert "It broke. No epoch" in diverged_message("It broke.", folder)
    for epoch in (1, 2):
        folder.epoch(epoch).mkdir(parents=True)
        folder.epoch_lora(epoch).touch()
    assert diverged_message("It broke.", folder).endswith(f"{folder.epoch_lora(2)}.")
