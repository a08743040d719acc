"""The command `sdlora plan`; `sdlora config` is in `test_main`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sdlora.cli.main import app
from sdlora.errors import ConfigError

KEYS = {
    "trainable_parameters", "base_parameters", "peak_bytes", "parts", "fits", "steps", "exposures_per_picture",
    "seconds",
}  # fmt: skip


def plan(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["plan", *arguments])
    if result.exception is not None:
        raise result.exception
    return result.stdout


def test_family_is_estimated_without_weights() -> None:
    small = ["--family", "sd1", "--resolution", "128", "--set", "preview.enabled=false"]
    found = json.loads(plan(*small, "--memory", "64GiB", "--json"))
    assert set(found) >= KEYS
    assert found["trainable_parameters"] == 795_648
    assert found["base_parameters"] == 859_520_964
    assert found["fits"] is True
    assert found["peak_bytes"] == sum(found["parts"].values())
    assert found["seconds"] is None
    assert found["full_training_bytes"] == 16 * 859_520_964


def test_family_that_does_not_fit_is_told_what_to_change(small: None) -> None:
    told = plan("--family", "sd1", "--resolution", "128", "--memory", "1MiB", "--set", "train.batch_size=32")
    assert "It does not fit into 1.0 MiB." in told
    assert "train.batch_size = 1" in told


def test_configuration_is_estimated_with_its_images(tmp_path: Path, overrides: list[str]) -> None:
    source = tmp_path / "mine.toml"
    source.write_text("[data]\ntrigger = 'zumi'\nrepeats = 4\n")
    changes = [part for override in overrides for part in ("--set", override)]
    found = json.loads(plan(str(source), *changes, "--json"))
    assert (found["pictures"], found["buckets"]) == (5, {"32x32": 3, "40x24": 2})
    assert (found["steps"], found["exposures_per_picture"]) == (20, 8)
    assert found["seconds"] > 0
    # In two bytes each: eight channels of 8 x 8 and 10 x 6 latents, and five captions of 77 tokens of 16 channels.
    assert found["cache_bytes"] == 2 * (8 * (3 * 64 + 2 * 60) + 5 * 77 * 16)
    assert not list((tmp_path / "cache").glob("moments/*"))
    assert "5 images (3 of 32x32, 2 of 40x24), each seen 8 times: 20 steps." in plan(str(source), *changes)


def test_malformed_memory_size_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"--memory: .*'much'"):
        plan("--family", "sd1", "--memory", "much")


def test_configuration_and_family_exclude_each_other() -> None:
    for arguments in ([], ["quickstart", "--family", "sd1"]):
        with pytest.raises(ConfigError, match="--family"):
            plan(*arguments)
    with pytest.raises(ConfigError, match="use --set"):
        plan("quickstart", "--rank", "4")
