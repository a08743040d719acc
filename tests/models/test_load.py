"""Hub ids, as far as that goes without a network: from the hub's own cache on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from helpers.tiny import make_tiny_pipeline

from sdlora.config.toml import load_config
from sdlora.errors import BaseModelError, ConfigError
from sdlora.events import CheckpointDue, RunDone
from sdlora.models.load import LoadOptions, load_base
from sdlora.run.run import start

FIRST, SECOND = "a1" * 20, "b2" * 20


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache that holds owner/name at two commits, of which `main` is the first."""
    cache = tmp_path / "hub"
    repository = cache / "models--owner--name"
    for commit, kind in ((FIRST, "epsilon"), (SECOND, "v_prediction")):
        make_tiny_pipeline(repository / "snapshots" / commit, prediction_type=kind)
    point_main_to(repository, FIRST)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return repository


def point_main_to(repository: Path, commit: str) -> None:
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / "main").write_text(commit)


def found(revision: str | None) -> tuple[str | None, str]:
    base = load_base(
        "owner/name", device=torch.device("cpu"), dtype=torch.float32, options=LoadOptions(revision=revision)
    )
    return base.revision, base.prediction_type


def test_hub_id_is_resolved_to_a_commit(hub: Path) -> None:
    assert found(None) == found("main") == (FIRST, "epsilon")
    assert found(SECOND) == (SECOND, "v_prediction")
    with pytest.raises(BaseModelError, match="could not be loaded"):
        found("3" * 40)


def test_resumed_run_keeps_its_commit(hub: Path, tmp_path: Path, overrides: list[str]) -> None:
    source = tmp_path / "hero.toml"
    source.write_text("[data]\ntrigger = 'zumi'\n")
    options = [*overrides, "base.path=owner/name", "base.revision=main", "preview.enabled=false"]
    config, folder = load_config(str(source), options), tmp_path / "run"
    for event in start(config, folder):
        if isinstance(event, CheckpointDue):
            break
        if event.__class__.__name__ == "EpochDone" and (folder / "checkpoints").exists():
            break
    assert f'revision = "{FIRST}"' in (folder / "config.toml").read_text()
    point_main_to(hub, SECOND)
    events = list(start(config, folder, resume=True))
    assert isinstance(events[-1], RunDone)
    with pytest.raises(ConfigError, match=rf"base.revision: was '{FIRST}', now '{SECOND}'"):
        list(start(load_config(str(source), [*options, f"base.revision={SECOND}"]), folder, resume=True))


def test_variants_are_read(tmp_path: Path, tiny_base: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_base, safety_checker=None)
    for variant, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16)):
        pipeline.to(dtype).save_pretrained(tmp_path / variant, variant=variant)
        base = load_base(
            str(tmp_path / variant),
            device=torch.device("cpu"),
            dtype=torch.float32,
            options=LoadOptions(variant=variant),
        )
        assert next(base.network.parameters()).dtype == next(base.text_encoders[0].parameters()).dtype == torch.float32
        with pytest.raises(BaseModelError, match=r"base\.variant = 'fp16'"):
            load_base(str(tmp_path / variant), device=torch.device("cpu"), dtype=torch.float32)
