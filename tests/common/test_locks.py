"""Locks between processes: held by one, free when it ends, never told of another process that got its number."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from helpers.lock_holders import other_process

from sdlora.common.locks import Holder, hold, holder
from sdlora.errors import BusyError


def test_one_process_holds_it_and_others_are_told_who(tmp_path: Path) -> None:
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
        with pytest.raises(BusyError), hold(path, "mine, once more"):
            pass
    assert path.exists() and holder(path) is None


def test_a_process_that_was_killed_holds_nothing(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    with other_process(path) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert json.loads(path.read_text())["pid"] == process.pid, "what it wrote is still there"
        assert holder(path) is None
        with hold(path, "mine"):
            pass


def test_a_number_that_was_given_again_is_another_process(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    with hold(path, "mine"):
        told = json.loads(path.read_text())
    path.write_text(json.dumps(told))
    assert holder(path) is not None
    path.write_text(json.dumps({**told, "birth": "1"}))
    assert holder(path) is None
    path.write_text("{half")
    assert holder(path) is None


def test_waiting_ends_when_the_other_ends(tmp_path: Path) -> None:
    path = tmp_path / "gpu.lock"
    seen: list[Holder | None] = []
    with other_process(path) as process:

        def wait(other: Holder | None) -> None:
            seen.append(other)
            process.communicate("")

        with hold(path, "mine", wait):
            pass
    assert [other.pid for other in seen if other] == [process.pid]
