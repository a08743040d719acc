"""Workers that end without a word, and words that no worker should have said."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from sdlora.batch import engine
from sdlora.batch.engine import Task, run_here

TASKS = [Task(name, {}, name) for name in ("a", "b", "c")]


def run_with(program: str, folder: Path, monkeypatch: pytest.MonkeyPatch, workers: int = 1) -> list[tuple[str, str]]:
    """(job, event or status) of all messages, with a program in the worker's place."""
    script = folder / "worker.py"
    script.write_text(program, encoding="utf-8")
    real = engine.subprocess.Popen
    monkeypatch.setattr(engine.subprocess, "Popen", lambda _, **kw: real([sys.executable, str(script)], **kw))
    found = run_here(TASKS, lambda: False, logs=folder / "logs", environments=[{}] * workers)
    return [(message["job"], message.get("status") or message["event"]) for message in found]


ANSWER = """
import json, sys
for line in sys.stdin:
    job = json.loads(line)["job"]
    {first}
    print(json.dumps({{"job": job, "event": "ended", "status": "done"}}), flush=True)
"""


def test_tasks_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = run_with(ANSWER.format(first="pass"), tmp_path, monkeypatch)
    assert found == [(job, word) for job in "abc" for word in ("started", "done")]


def test_dead_worker_loses_one_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dies = "if job == 'b': sys.exit(3)"
    found = run_with(ANSWER.format(first=dies), tmp_path, monkeypatch)
    assert [pair for pair in found if pair[1] != "started"] == [("a", "done"), ("b", "cut"), ("c", "done")]


def test_worker_that_cannot_start_ends_the_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = run_with("import sys; sys.exit('no')", tmp_path, monkeypatch)
    assert [pair for pair in found if pair[1] != "started"] == [(job, "cut") for job in "abc"]
    assert (tmp_path / "logs" / "worker0.txt").read_text() == "no\n" * 3


def test_torn_message_ends_its_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torn = "if job == 'a': print('{\"job\": \"a', flush=True); sys.exit(0)"
    found = run_with(ANSWER.format(first=torn), tmp_path, monkeypatch)
    assert [pair for pair in found if pair[1] != "started"] == [("a", "cut"), ("b", "done"), ("c", "done")]


def test_several_workers_share_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = run_with(ANSWER.format(first="pass"), tmp_path, monkeypatch, workers=2)
    assert sorted(job for job, word in found if word == "done") == ["a", "b", "c"]
    assert found[:2] == [("a", "started"), ("b", "started")]
