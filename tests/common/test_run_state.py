import json
from pathlib import Path

import pytest

from sdlora.common.run_state import RunState, read_state
from sdlora.events import to_json


def test_written_state_is_read_back(tmp_path: Path) -> None:
    state = RunState(status="failed", phase="train", step=3, total_steps=9, pid=7, started="2026-01-01T00:00:00+0000")
    (tmp_path / "s").write_text(json.dumps(to_json(state)))
    assert read_state(tmp_path / "s") == state


def test_keys_in_the_file_stay_as_they_are() -> None:
    assert list(to_json(RunState(pid=7, started=""))) == [
        "status", "phase", "epoch", "step", "total_steps", "done", "total", "eta_seconds", "pid", "started", "error",
        "closing_seconds",
    ]  # fmt: skip


def test_state_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    old = to_json(RunState(status="done", pid=7, started="")) | {"unknown": 1}
    del old["closing_seconds"]
    (tmp_path / "s").write_text(json.dumps(old))
    found = read_state(tmp_path / "s")
    assert found is not None and (found.status, found.closing_seconds) == ("done", None)


@pytest.mark.parametrize("content", [None, "", "{", "[]", "3", "{}"])
def test_missing_or_foreign_file_is_none(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "s").write_text(content)
    assert read_state(tmp_path / "s") is None
