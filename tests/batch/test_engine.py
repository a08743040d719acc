"""Workers that end without a word, and words that no worker should have said."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from sdlora.batch import engine
from sdlora.batch.batch import run_batch
from sdlora.batch.engine import RayEngine, Task, _stop_poll, run_here
from sdlora.batch.jobs import read_jobs
from sdlora.batch.location import Location
from sdlora.config.toml import parse_config
from sdlora.errors import ConfigError, StoreError

TASKS = [Task(name, {}, name) for name in ("a", "b", "c")]
CONFIG = """
[data]
folder = "file://{images}"
repeats = 20
resolution_px = 32
bucket_step_px = 8
[base]
path = "{base}"
[train]
epochs = 2
checkpoint_every_steps = 5
log_every_steps = 1
device = "cpu"
[lora]
rank = 2
[preview]
enabled = false
[copycheck]
enabled = false
"""


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


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Any]:
    """A cluster of one node; what is kept on it is in `first`."""
    pytest.importorskip("ray", reason="ray is not installed")
    import ray
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "env_vars": home(tmp_path / "first")})
    try:
        yield made
    finally:
        ray.shutdown()
        made.shutdown()


def home(folder: Path) -> dict[str, str]:
    """What keeps a node's copies and caches in a folder of its own."""
    return {"XDG_CACHE_HOME": str(folder)}


def jobs_file(folder: Path, images: Path, base: Path) -> Path:
    text = CONFIG.format(folder=folder, images=images, base=base)
    (folder / "ray.toml").write_text(text, encoding="utf-8")
    file = folder / "jobs.toml"
    file.write_text(f'[defaults]\nconfig = "{folder}/ray.toml"\n[sweep]\nseed = [1, 2, 3, 4, 5, 6, 7, 8]\n')
    return file


def node_of(pid: int) -> int | None:
    """The raylet that a worker process belongs to."""
    import psutil

    try:
        return next((p.pid for p in psutil.Process(pid).parents() if "raylet" in p.name()), None)
    except psutil.NoSuchProcess:
        return None


def running_on(raylet: int, bucket: Path) -> list[str]:
    """Jobs that have a checkpoint in the store and run on a node."""
    states = {file.parent.name: json.loads(file.read_text()) for file in bucket.glob("*/state.json")}
    return [
        name
        for name, state in states.items()
        if state["status"] == "running"
        and list(bucket.glob(f"{name}/checkpoints/*/complete.json"))
        and node_of(state["pid"]) == raylet
    ]


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_lost_node_loses_no_job(tmp_path: Path, images: Path, tiny_base: Path, cluster: Any) -> None:
    import ray

    second = cluster.add_node(num_cpus=1, env_vars=home(tmp_path / "second"))
    ray.init(address=cluster.address, log_to_driver=False)
    (raylet,) = [info.process.pid for infos in second.all_processes.values() for info in infos
                 if "raylet" in str(info.process.args)]  # fmt: skip
    bucket, lost = tmp_path / "bucket", []

    def kill_when_busy() -> bool:
        if not lost and (found := running_on(raylet, bucket)):
            lost.extend(found)
            cluster.remove_node(second, allow_graceful=False)
        return False

    location = Location(f"file://{bucket}")
    engine = RayEngine(location, cluster.address, None)
    jobs = read_jobs(jobs_file(tmp_path, images, tiny_base))
    *_, standing = run_batch(jobs, location, engine.run, retry=False, should_stop=kill_when_busy)
    assert lost, "no job ran on the second node"
    assert (len(standing["done"]), standing["failed"], standing["open"]) == (8, [], [])
    for name in lost:
        log = (bucket / name / "log.txt").read_text(encoding="utf-8")
        (resumed,) = [line for line in log.splitlines() if "Resumed at step" in line]
        assert int(resumed.partition("Resumed at step ")[2].split()[0]) >= 5
        rows = [json.loads(line) for line in (bucket / name / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows if row["event"] == "step"] == list(range(1, 201))
        number = json.loads((bucket / name / "mirror.json").read_text())["run"]
        kept = [tmp_path / node / "sdlora/stores/runs" / number for node in ("first", "second")]
        assert [(folder / f"{name}.safetensors").is_file() for folder in kept] == [True, False]
        assert kept[1].is_dir(), "it began on the node that was lost"
    assert "8 of 8 jobs are done" in (bucket / "report.html").read_text(encoding="utf-8")


class Ray(ModuleType):
    """Stands in for Ray: every task is carried out, here, when it is waited for."""

    def __init__(self) -> None:
        super().__init__("ray")
        self.is_initialized = lambda: True
        self.cluster_resources = dict[str, float]
        self.cancel = lambda *_, **__: None

    def remote(self, **options: Any) -> Callable[[Any], Any]:
        assert options["max_retries"] == -1
        remote = ModuleType("remote")
        return lambda function: setattr(remote, "remote", lambda *given: lambda: function(*given)) or remote

    def wait(self, waiting: Sequence[Any], **_: Any) -> tuple[list[Any], list[Any]]:
        return [waiting[0]], list(waiting[1:])

    def get(self, reference: Any) -> Any:
        return reference()


def test_jobs_use_a_shared_folder_and_stop_on_request(
    tmp_path: Path, overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", Ray())
    location = Location(str(tmp_path / "jobs"))
    settings = [*overrides, "preview.enabled=false", "train.epochs=1"]
    config = parse_config({"data": {"folder": "x"}}, name="a", overrides=settings)
    tasks = [Task(name, config.model_dump(mode="json"), location.run(name)) for name in ("one", "two")]
    engine = RayEngine(location, None, None)
    found = list(engine.run(tasks[:1], lambda: False))
    assert [message.get("status") for message in found] == [None, "done"]
    assert (tmp_path / "jobs/one/a.safetensors").is_file()
    # A wish to stop is asked for by whoever carries a task out, wherever that is.
    found = list(engine.run(tasks[1:], lambda: True))
    assert [message.get("status") for message in found] == [None, "stopped"]
    assert not location.stop_requested()


def test_unreachable_store_stops_no_job(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    location, answers = Location(str(tmp_path)), [StoreError("away"), False, True]

    def asked() -> bool:
        answer = answers.pop(0)
        if isinstance(answer, StoreError):
            raise answer
        return answer

    monkeypatch.setattr(location, "stop_requested", asked)
    monkeypatch.setattr("sdlora.batch.engine._STOP_POLL_SECONDS", 0.0)
    wish = _stop_poll(location)
    assert [wish() for _ in range(5)] == [False, False, True, True, True]
    monkeypatch.setattr("sdlora.batch.engine._STOP_POLL_SECONDS", 3600.0)
    answers[:] = [False]
    wish = _stop_poll(location)
    assert [wish() for _ in range(5)] == [False] * 5, "it is not asked at every step"


def test_missing_ray_names_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match="pip install"):
        RayEngine(Location(str(tmp_path)), None, None)
