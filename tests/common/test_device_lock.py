"""Turns on a GPU; none is needed here, since the lock is a file."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from helpers.lock_holders import other_process

from sdlora.common import device_lock as module
from sdlora.common.device_lock import device_lock, take_turns
from sdlora.common.locks import holder
from sdlora.errors import BusyError


def test_cpu_has_no_lock() -> None:
    assert device_lock(torch.device("cpu")) is None


def test_gpu_lock_is_named_by_uuid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        uuid = "1234-abcd"

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties)
    monkeypatch.setattr(module, "user_state_path", lambda *_, **__: tmp_path)
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
        monkeypatch.setattr(module.time, "sleep", lambda _: process.communicate(""))
        turns = take_turns(path, "mine", held, wait=True, should_stop=lambda: False)
        assert len(list(turns)) == 1
        found = holder(path)
        assert found is not None and found.purpose == "mine"
