"""`sdlora presets`, and the counted figures that it prints."""

from __future__ import annotations

import json

import pytest
from helpers.command import call

from sdlora.config.presets import Preset, presets
from sdlora.run.estimate import count_preset


def test_presets_are_listed_with_what_they_need(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "presets", "--json")
    rows = {row["name"]: row for row in json.loads(out)}
    assert code == 0
    assert rows.keys() == {preset.name for preset in presets()}
    assert all(row["peak_bytes"] > 0 and row["least_seconds"] > 0 for row in rows.values())
    assert rows["sdxl-character"]["least_seconds"] > 5 * rows["sd15-character"]["least_seconds"]
    code, out, _ = call(capsys, "presets")
    assert code == 0
    assert all(name in out for name in rows)
    assert max(map(len, out.splitlines()[: len(rows) + 1])) <= 80


def counted(name: str) -> Preset:
    return next(preset for preset in presets() if preset.name == name)


@pytest.mark.parametrize(
    "name", ["quickstart", "sd15-object", *(pytest.param(p.name, marks=pytest.mark.slow) for p in presets())]
)
def test_shipped_figures_are_those_that_counting_gives(name: str) -> None:
    preset = counted(name)
    assert count_preset(preset) == {key: getattr(preset, key) for key in ("peak_bytes", "flops_per_exposure")}
