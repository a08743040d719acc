"""A batch at a URL: what one machine has done, another one finds there; and the record of its jobs."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from helpers.batches import QUICK

from sdlora.batch.batch import run_batch
from sdlora.batch.engine import Message, Task, run_here, started
from sdlora.batch.jobs import Job, read_jobs
from sdlora.batch.location import Ledger, Location, Record, locked
from sdlora.batch.task import run_task
from sdlora.common.remote import Store
from sdlora.config.toml import parse_config
from sdlora.errors import OutputError, StoreError
from sdlora.run.setup import fresh_base


def in_this_process(tasks: Sequence[Task], should_stop: Callable[[], bool]) -> Iterator[Message]:
    for task in tasks:
        yield started(task)
        yield from run_task(task, fresh_base, should_stop)


def jobs_file(folder: Path, images: Path, base: Path) -> Path:
    """Jobs a, b and long, of 3, 3 and 80 steps; their images are at a URL, too."""
    settings = f'[base]\npath = "{base}"\n[cache]\ndir = "{folder}/cache"\n'
    (folder / "quick.toml").write_text(QUICK + settings, encoding="utf-8")
    file = folder / "jobs.toml"
    file.write_text(
        f'[defaults]\nconfig = "{folder}/quick.toml"\n'
        f'[defaults.set]\n"data.folder" = "file://{images}"\n"data.repeats" = 1\n"train.epochs" = 1\n'
        '[[jobs]]\nname = "a"\n[[jobs]]\nname = "b"\nset = { "seed" = 1 }\n'
        '[[jobs]]\nname = "long"\nset = { "data.repeats" = 32 }\n',
        encoding="utf-8",
    )
    return file


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Goes to a machine of a name; gives the folder of what stores keep on it."""

    def go_to(name: str) -> Path:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / name))
        return tmp_path / name / "sdlora" / "stores"

    return go_to


@pytest.fixture
def memory() -> Iterator[dict[str, object]]:
    """Files of the store memory://."""
    yield MemoryFileSystem.store
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


@pytest.mark.slow
def test_a_home_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Location("~/runs/x").folder == tmp_path / "runs" / "x"


def test_batch_at_a_url_resumes_on_another_machine(
    tmp_path: Path, images: Path, tiny_base: Path, machine: Callable[[str], Path]
) -> None:
    jobs = read_jobs(jobs_file(tmp_path, images, tiny_base))
    bucket = tmp_path / "bucket"
    location = lambda: Location(f"file://{bucket}")  # noqa: E731
    first = machine("first")
    seen, killed = [], False
    engine = partial(run_here, logs=first / "workers", environments=[{}])
    for message in run_batch(jobs, location(), engine, retry=False, should_stop=lambda: False):
        seen.append(message)
        if not killed and message.get("job") == "long" and message["event"] == "step" and message["step"] >= 6:
            (lock,) = [file for file in (first / "runs").glob("*/run.lock") if file.stat().st_size]
            os.kill(json.loads(lock.read_text())["pid"], signal.SIGKILL)
            killed = True
    assert (seen[-1]["done"], seen[-1]["failed"], seen[-1]["open"]) == (["a", "b"], ["long"], [])
    assert seen[-1]["folder"] == f"file://{bucket}"
    made = {name: (bucket / name / f"{name}.safetensors").stat().st_mtime_ns for name in "ab"}
    assert "2 of 3 jobs are done" in (bucket / "report.html").read_text(encoding="utf-8")

    second = machine("second")
    seen = list(run_batch(jobs, location(), in_this_process, retry=False, should_stop=lambda: False))
    assert [m["action"] for m in seen if m["event"] == "planned"] == ["skip", "skip", "resume"]
    steps = [m["step"] for m in seen if m["event"] == "step"]
    assert steps == list(range(steps[0], 81)) and steps[0] > 4, "it went on from its checkpoint"
    assert seen[-1]["done"] == ["a", "b", "long"]
    assert made == {name: (bucket / name / f"{name}.safetensors").stat().st_mtime_ns for name in "ab"}
    (run,) = (second / "runs").iterdir()
    assert json.loads((bucket / "long/mirror.json").read_text())["run"] == run.name
    assert (bucket / "long/long.safetensors").read_bytes() == (run / "long.safetensors").read_bytes()
    rows = [json.loads(line) for line in (bucket / "long/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["event"] == "step"] == list(range(1, 81))
    page = (bucket / "report.html").read_text(encoding="utf-8")
    assert "3 of 3 jobs are done" in page and page.count('class="tile') == 3
    results = json.loads((bucket / "results.json").read_text())
    assert all(result["seconds"] > 0 for result in results)
    assert (bucket / "results.csv").read_text().count("\n") == 4

    machine("third")
    last = run_batch(jobs, location(), in_this_process, retry=True, should_stop=lambda: False)
    assert {message["event"] for message in last} == {"planned", "batch"}
    assert not [file for file in bucket.rglob("*") if "partial" in file.name]


@pytest.mark.parametrize("kind", ["memory://bucket/jobs", "file://{}/jobs", "{}/jobs"])
def test_every_kind_of_location_moves_runs_aside_and_carries_stop_requests(
    kind: str, tmp_path: Path, machine: Callable[[str], Path], memory: dict[str, object]
) -> None:
    machine("here")
    output = kind.format(tmp_path)
    location, store = Location(output), Store(output)
    assert location.name == "jobs" and location.move_aside("a job") is None
    for number in (b"1", b"2"):
        Store(location.run("a job")).write("config.toml", number)
        Store(f"{location.run('a job')}/epochs/1").write("copycheck.json", number)
        assert location.move_aside("a job") == f"{output}/a job.{number.decode()}"
        assert not store.has("a job")
    assert store.read("a job.1/epochs/1/copycheck.json") == b"1"
    assert store.read("a job.2/config.toml") == b"2"
    assert not location.stop_requested()
    location.request_stop(True)
    assert Location(output).stop_requested()
    for _ in range(2):
        location.request_stop(False)
        assert not Location(output).stop_requested()


class Failing:
    """Fails every job, and after the first one the store does not answer any more."""

    def __init__(self, broken: list[str]) -> None:
        self._broken = broken

    def __call__(self, tasks: Sequence[Task], should_stop: Callable[[], bool]) -> Iterator[Message]:
        for task in tasks:
            yield started(task)
            self._broken.append(task.job)
            yield {
                "job": task.job, "event": "ended", "status": "failed", "error": f"no {task.job}", "exit_code": 3,
                "epoch": None, "seconds": 1.0, "peak_memory_bytes": None,
            }  # fmt: skip


def test_failed_upload_is_reported_and_retried(
    machine: Callable[[str], Path], memory: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    put, broken = MemoryFileSystem.put_file, list[str]()

    def put_file(files: MemoryFileSystem, source: str, target: str, **options: object) -> None:
        if broken:
            raise RuntimeError("the bucket is on fire")
        put(files, source, target, **options)

    monkeypatch.setattr(MemoryFileSystem, "put_file", put_file)
    home, url, seen = machine("here"), "memory://bucket/jobs", list[Message]()
    jobs = [Job("a", 0, {}, parse_config({"data": {"folder": "x"}}, name="a"))]
    batch = lambda: run_batch(jobs, Location(url), Failing(broken), retry=False, should_stop=lambda: False)  # noqa: E731
    with pytest.raises(StoreError, match="on fire"):
        seen.extend(batch())
    assert [message["event"] for message in seen] == ["planned", "started", "ended", "notice"]
    assert "on fire" in seen[-1]["message"]
    (page,) = home.glob("batches/*/report.html")
    assert "no a" in page.read_text(encoding="utf-8")
    seen.clear()
    with pytest.raises(StoreError, match="on fire"):
        seen.extend(batch())
    assert [message["event"] for message in seen] == ["planned"], "nothing begins that could not be kept"
    broken.clear()
    seen.extend(message for message, _ in zip(batch(), range(2), strict=False))
    assert [message.get("action") for message in seen] == ["resume", "resume", None]


def test_saved_records_are_read_back(tmp_path: Path) -> None:
    ledger = Ledger.read(tmp_path)
    assert ledger.records == {}
    ledger.put("a", Record("done", "x", None, None, 0, 3, 1.5, 1000))
    ledger.put("b", Record("failed", "y", "why", None, 5))
    assert Ledger.read(tmp_path) == ledger


def test_foreign_file_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "batch.json").write_text("[1]")
    with pytest.raises(OutputError, match=r"batch\.json"):
        Ledger.read(tmp_path)


def test_locked_folder_refuses_a_second_process(tmp_path: Path) -> None:
    with locked(tmp_path / "out"), pytest.raises(OutputError, match="out"), locked(tmp_path / "out"):
        pass
    with locked(tmp_path / "out"):
        pass
