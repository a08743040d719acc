"""Locks between processes: held by one, free when it ends, never credited to a process that reuses its ID."""

from __future__ import annotations

import json
import os
import signal
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from helpers.lock_holders import other_process

from sdlora.common import locks
from sdlora.common.locks import Holder, device_lock, hold, holder, take_turns
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


def test_cpu_has_no_lock() -> None:
    assert device_lock(torch.device("cpu")) is None


def test_gpu_lock_is_named_by_uuid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        uuid = "1234-abcd"

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties)
    monkeypatch.setattr(locks, "user_state_path", lambda *_, **__: tmp_path)
    assert device_lock(torch.device("cuda:1")) == tmp_path / "cuda-1234-abcd.lock"


def test_free_device_is_held_without_notice(tmp_path: Path) -> None:
    path = tmp_path / "gpu.lock"
    with ExitStack() as held:
        assert not list(take_turns(path, "mine", held, wait=False, should_stop=lambda: False))
        assert holder(path) is not None
    assert holder(path) is None


def test_device_in_use_is_waited_for_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "gpu.lock"
    with other_process(path) as process, ExitStack() as held:
        with pytest.raises(BusyError, match=rf"in use by process {process.pid} .*--no-wait"):
            list(take_turns(path, "mine", held, wait=False, should_stop=lambda: False))
        (notice,) = take_turns(path, "mine", held, wait=True, should_stop=lambda: True)
        assert f"in use by process {process.pid} (a test)" in notice.message
        monkeypatch.setattr(locks.time, "sleep", lambda _: process.communicate(""))
        turns = take_turns(path, "mine", held, wait=True, should_stop=lambda: False)
        assert len(list(turns)) == 1
        found = holder(path)
        assert found is not None and found.purpose == "mine"
