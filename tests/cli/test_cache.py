"""`sdlora cache` on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.command import call


def test_cache_is_filled_and_nothing_is_trained(
    tmp_path: Path, overrides: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.toml").write_text("")
    settings = [part for change in overrides for part in ("--set", change)]
    code, out, err = call(capsys, "cache", "mine.toml", *settings, "--workers", "1", "--json")
    assert code == 0, err
    events = [json.loads(line) for line in out.splitlines()]
    assert events[-1] == {"event": "progress", "phase": "cache", "done": 10, "total": 10}
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 10
    assert not (tmp_path / "runs").exists()
    code, _, err = call(capsys, "cache", "mine.toml", *settings, "--set", "data.folder=nowhere")
    assert code == 3 and "nowhere" in err
