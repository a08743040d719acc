"""Turns on a GPU; none is needed here, for a lock is a file."""

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


def test_a_cpu_is_shared() -> None:
    assert device_lock(torch.device("cpu")) is None


def test_a_gpu_is_known_by_its_own_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        uuid = "1234-abcd"

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties)
    monkeypatch.setattr(module, "user_state_path", lambda *_, **__: tmp_path)
    assert device_lock(torch.device("cuda:1")) == tmp_path / "cuda-1234-abcd.lock"


def test_a_free_device_is_taken_without_a_word(tmp_path: Path) -> None:
    path = tmp_path / "gpu.lock"
    with ExitStack() as held:
        assert not list(take_turns(path, "mine", held, wait=False, should_stop=lambda: False))
        assert holder(path) is not None
    assert holder(path) is None


def test_a_device_in_use_is_waited_for_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "gpu.lock"
    with other_process(path) as process, ExitStack() as held:
        with pytest.raises(BusyError, match=rf"in use by process {process.pid} .*--no-wait"):
            list(take_turns(path, "mine", held, wait=False, should_stop=lambda: False))
        assert [n.message for n in take_turns(path, "mine", held, wait=True, should_stop=lambda: True)] == [
            f"Waiting for the GPU, which is in use by process {process.pid} (a test). Ctrl-C gives up."
        ]
        monkeypatch.setattr(module.time, "sleep", lambda _: process.communicate(""))
        turns = take_turns(path, "mine", held, wait=True, should_stop=lambda: False)
        assert len(list(turns)) == 1
        found = holder(path)
        assert found is not None and found.purpose == "mine"
