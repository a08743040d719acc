"""Forecasts of configurations against the run itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch

from sdlora.cli.describe import describe_plan
from sdlora.common.text import format_bytes
from sdlora.config.toml import load_config, parse_config
from sdlora.estimate.meta_model import num_bytes
from sdlora.events import PlanMade
from sdlora.run import estimate
from sdlora.run.folder import RunFolder
from sdlora.run.run import start
from sdlora.run.setup import load, prepare


def test_a_forecast_counts_what_the_run_then_does(tmp_path: Path, overrides: list[str]) -> None:
    source = tmp_path / "mine.toml"
    source.write_text("[data]\ntrigger = 'zumi'\n")
    config = load_config(str(source), overrides)
    found = estimate.forecast_config(config, None)
    parts = prepare(config, RunFolder(tmp_path / "run", "mine"))
    assert found.steps == parts.trainer.total_steps
    assert found.trainable_parameters == parts.adapter.num_parameters()
    assert found.base_parameters == parts.adapter.num_base_parameters()
    assert found.fits is True
    assert found.memory_bytes is not None
    assert found.memory_bytes <= psutil.virtual_memory().total
    list(parts.data.fill("white", parts.trainer.schedule.timesteps))
    kept = sum(p.stat().st_size for p in (tmp_path / "cache").rglob("*.safetensors"))
    assert found.cache_bytes is not None
    assert found.cache_bytes <= kept < found.cache_bytes + 10 * 300  # names and shapes in ten files


def test_a_run_tells_its_memory_unless_the_base_is_small(
    tmp_path: Path, overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "mine.toml"
    source.write_text("[data]\ntrigger = 'zumi'\n")
    config = load_config(str(source), [*overrides, "preview.enabled=false"])
    (plan,) = [e for e in start(config, tmp_path / "small") if isinstance(e, PlanMade)]
    assert plan.peak_bytes is None
    assert "GiB" not in describe_plan(plan)
    monkeypatch.setattr(estimate, "_SMALL_BASE", 0)
    (plan,) = [e for e in start(config, tmp_path / "run") if isinstance(e, PlanMade)]
    assert plan.peak_bytes == estimate.forecast_config(config, None).peak_bytes
    assert format_bytes(plan.memory_bytes or 0) in describe_plan(plan)
    short = replace(plan, memory_bytes=plan.peak_bytes - 1)
    assert "sdlora plan" in describe_plan(short)


def test_what_is_loaded_counts_as_memory_there_is(tmp_path: Path, overrides: list[str]) -> None:
    source = tmp_path / "mine.toml"
    source.write_text("")
    loaded = load(load_config(str(source), overrides))
    assert estimate.device_memory(torch.device("cpu")) > 0
    setting, cache_bytes = estimate.setting_of(load_config(str(source), overrides), loaded)
    assert setting.on_cpu
    assert setting.cached_bytes == cache_bytes
    assert setting.bucket in {(40, 24), (32, 32)}


def test_text_encoders_that_wait_elsewhere_are_not_counted_as_free_memory(
    tmp_path: Path, overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "mine.toml"
    source.write_text("[data]\ntrigger = 'zumi'\n")
    config = load_config(str(source), overrides)
    parts = prepare(config, RunFolder(tmp_path / "run", "mine"))
    monkeypatch.setattr(estimate, "_SMALL_BASE", 0)
    monkeypatch.setattr(estimate, "device_memory", lambda _: 0)
    given = estimate._setting(config, parts.base, parts.data, torch.device("cpu"))
    monkeypatch.setattr(estimate, "_setting", lambda *_: given)
    found = []
    for device in ("cpu", "meta"):
        for encoder in parts.base.text_encoders:
            encoder.to(device)
        found.append(estimate.memory_of_run(config, parts.base, parts.data, torch.device("cpu"))[1])
    assert found[0] is not None and found[1] is not None
    assert found[0] - found[1] == num_bytes(*parts.base.text_encoders) > 0


def test_forecast_of_a_family_uses_the_most_repeated_set() -> None:
    sets = [{"folder": "a", "repeats": 2}, {"folder": "b", "repeats": 7}]
    config = parse_config({"data": {"sets": sets}, "train": {"epochs": 3}}, name="mine")
    assert estimate.forecast_family("sd1", config, None).exposures_per_image == 21
