"""Estimates of configurations against the runs themselves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch

from sdlora.cli.progress import describe_plan
from sdlora.common.bundled import pocket_folder
from sdlora.common.text import format_bytes
from sdlora.config.toml import load_config, parse_config
from sdlora.errors import ConfigError
from sdlora.estimate.hints import with_values
from sdlora.estimate.meta_model import num_bytes, shapes_of_family, shapes_on_disk
from sdlora.events import PlanMade
from sdlora.lora.quantize import TYPICAL_ERRORS
from sdlora.run import estimate
from sdlora.run.folder import RunFolder
from sdlora.run.run import start
from sdlora.run.setup import RunContext, prepare
from sdlora.training.train_step import TrainStep


def prepared(folder: Path, overrides: list[str]) -> RunContext:
    source = folder / "mine.toml"
    source.write_text("[data]\ntrigger = 'zumi'\n")
    return prepare(load_config(str(source), overrides), RunFolder(folder / "run", "mine"))


def test_estimate_counts_what_the_run_does(tmp_path: Path, overrides: list[str]) -> None:
    parts = prepared(tmp_path, overrides)
    found = estimate.estimate_config(parts.config, None)
    assert found.steps == parts.trainer.total_steps
    assert found.trainable_parameters == parts.adapter.num_parameters()
    assert found.base_parameters == parts.adapter.num_base_parameters()
    assert found.fits is True and found.seconds is not None
    assert found.memory_bytes is not None
    assert found.memory_bytes <= psutil.virtual_memory().total
    list(parts.data.fill("white", parts.trainer.schedule.timesteps))
    kept = sum(p.stat().st_size for p in (tmp_path / "cache").rglob("*.safetensors"))
    assert found.cache_bytes is not None
    assert found.cache_bytes <= kept < found.cache_bytes + 10 * 300  # names and shapes in ten files


def test_estimate_without_memory_for_a_step_has_no_time(
    tmp_path: Path, overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError

    config = prepared(tmp_path, overrides).config
    monkeypatch.setattr(TrainStep, "gradients", full)
    whole = estimate.estimate_config(config, None)
    assert whole.peak_bytes is not None
    found = estimate.estimate_config(config, whole.peak_bytes - 1)
    assert found.seconds is None and found.fits is False and found.changes


def test_estimate_needs_neither_the_runs_optimizer_nor_its_copy_check(tmp_path: Path, overrides: list[str]) -> None:
    config = prepared(tmp_path, [*overrides, "copycheck.enabled=true"]).config
    eight_bits = config.model_copy(update={"train": config.train.model_copy(update={"optimizer": "adamw8bit"})})
    plain, found = (estimate.estimate_config(one, None) for one in (config, eight_bits))
    assert plain.parts["adapter"] - found.parts["adapter"] == 6 * found.trainable_parameters
    assert found.cache_bytes == plain.cache_bytes
    assert list(plain.chance_to_notice) == ["10%", "30%", "60%"]


def test_run_reports_its_memory_unless_the_base_is_small(
    tmp_path: Path, overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = prepared(tmp_path, [*overrides, "preview.enabled=false"]).config
    (plan,) = [e for e in start(config, tmp_path / "small") if isinstance(e, PlanMade)]
    assert plan.peak_bytes is None
    assert "GiB" not in describe_plan(plan)
    monkeypatch.setattr(estimate, "_SMALL_BASE", 0)
    (plan,) = [e for e in start(config, tmp_path / "large") if isinstance(e, PlanMade)]
    assert plan.peak_bytes == estimate.estimate_config(config, None).peak_bytes
    assert format_bytes(plan.memory_bytes or 0) in describe_plan(plan)
    assert plan.peak_bytes is not None
    short = replace(plan, memory_bytes=plan.peak_bytes - 1)
    assert "sdlora plan" in describe_plan(short)


def test_cached_tensors_count_as_memory_on_a_cpu(tmp_path: Path, overrides: list[str]) -> None:
    parts = prepared(tmp_path, overrides)
    assert estimate.device_memory(torch.device("cpu")) > 0
    inputs = estimate.memory_inputs(parts, parts.config)
    assert inputs.on_cpu
    assert inputs.cached_bytes == estimate.cache_bytes_of_run(parts, parts.config)
    assert inputs.size_px in {(40, 24), (32, 32)}
    parts = replace(parts, loaded=replace(parts.loaded, device=torch.device("cuda")))
    assert estimate.memory_inputs(parts, parts.config).cached_bytes == 0


def test_text_encoders_that_wait_elsewhere_are_not_counted_as_free_memory(
    tmp_path: Path, overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = prepared(tmp_path, overrides)
    monkeypatch.setattr(estimate, "_SMALL_BASE", 0)
    monkeypatch.setattr(estimate, "device_memory", lambda _: 0)
    inputs = estimate.memory_inputs(parts, parts.config)
    monkeypatch.setattr(estimate, "memory_inputs", lambda *_: inputs)
    found = []
    for device in ("cpu", "meta"):
        for encoder in parts.base.text_encoders:
            encoder.to(device)
        found.append(estimate.memory_of_run(parts)[1])
    assert found[0] is not None and found[1] is not None
    assert found[0] - found[1] == num_bytes(*parts.base.text_encoders) > 0


def test_estimate_of_a_family_uses_the_most_repeated_set() -> None:
    sets = [{"folder": "a", "repeats": 2}, {"folder": "b", "repeats": 7}]
    config = parse_config({"data": {"sets": sets}, "train": {"epochs": 3}}, name="mine")
    assert estimate.estimate_shapes(config, shapes_of_family("sd1"), None).exposures_per_image == 21


def test_changes_of_settings_make_a_run_fit_into_memory() -> None:
    given = ["train.device=cpu"]
    config = load_config("quickstart", given)
    assert estimate.changes_to_fit(config, 1 << 40) == []
    needed = estimate.estimate_shapes(config, shapes_on_disk(pocket_folder()), None, on_cpu=True).peak_bytes
    changes = estimate.changes_to_fit(config, needed * 3 // 4)
    changed = load_config("quickstart", [*given, *(one for change in changes for one in change.overrides())])
    assert changes and changed != config
    assert estimate.changes_to_fit(changed, needed * 3 // 4) == []
    with pytest.raises(ConfigError, match="too little"):
        estimate.changes_to_fit(config, 1000)


def test_memory_of_a_base_model_that_is_not_here_is_not_guessed() -> None:
    config = load_config("quickstart", ["base.path=owner/name", "base.family=any"])
    with pytest.raises(ConfigError, match=r"owner/name.*base\.family"):
        estimate.changes_to_fit(config, 1 << 33)


def test_packing_errors_are_told_of_the_base_at_hand_and_without_one(tmp_path: Path, overrides: list[str]) -> None:
    source = tmp_path / "mine.toml"
    source.write_text("[data]\ntrigger = 'zumi'\n")
    config = load_config(str(source), [*overrides, "base.quantization=int8"])
    (error,) = estimate.estimate_config(config, 2**40).packing_errors["int8"]
    assert 0.001 < error < 0.02
    plain = with_values(config, {"base.quantization": "none"})
    assert estimate.estimate_config(plain, 2**40).packing_errors == {}
    assert estimate.estimate_shapes(config, "sd1", None).packing_errors == {"int8": TYPICAL_ERRORS["int8"]}
