"""Locks between processes: held by one, free when it ends, never credited to a process that reuses its ID."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from helpers.lock_holders import other_process

from sdlora.common.locks import Holder, hold, holder
from sdlora.errors import BusyError


def test_held_lock_is_refused_naming_its_holder(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    assert holder(path) is None
    with other_process(path) as process:
        found = holder(path)
        assert found is not None and (found.pid, found.purpose) == (process.pid, "a test")
        with pytest.raises(BusyError, match=rf"process {process.pid} \(a test\)"), hold(path, "mine"):
            pass
        process.communicate("")
    assert holder(path) is None
    with hold(path, "mine"):
        assert holder(path) == Holder(os.getpid(), holder(path).birth, "mine")  # type: ignore[union-attr]
        with pytest.raises(BusyError), hold(path, "mine again"):
            pass
    assert path.exists() and holder(path) is None


def test_killed_process_holds_nothing(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    with other_process(path) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert json.loads(path.read_text())["pid"] == process.pid, "what it wrote remains"
        assert holder(path) is None
        with hold(path, "mine"):
            pass


def test_reused_process_id_is_not_the_holder(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    with hold(path, "mine"):
        told = json.loads(path.read_text())
    path.write_text(" " + json.dumps(told))
    assert holder(path) is not None
    path.write_text(" " + json.dumps({**told, "birth": "1"}))
    assert holder(path) is None
    path.write_text(" {half")
    assert holder(path) is None
