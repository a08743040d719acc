"""Jobs on a cluster of two nodes, of which one is lost: two raylets on this machine."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sdlora.batch.jobs import read_jobs
from sdlora.batch.rayengine import RayEngine
from sdlora.batch.supervise import run_batch

ray = pytest.importorskip("ray", reason="ray is not installed")

CONFIG = """
[data]
folder = "{pictures}"
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
[cache]
dir = "{folder}/cache"
"""


@pytest.fixture
def cluster() -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        yield made
    finally:
        ray.shutdown()
        made.shutdown()


def jobs_file(folder: Path, pictures: Path, base: Path) -> Path:
    text = CONFIG.format(folder=folder, pictures=pictures, base=base)
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


def running_on(raylet: int, output: Path) -> list[str]:
    """Jobs that have a checkpoint and run on a node."""
    states = {file.parent.name: json.loads(file.read_text()) for file in output.glob("*/state.json")}
    return [
        name
        for name, state in states.items()
        if state["status"] == "running" and state["step"] >= 5 and node_of(state["pid"]) == raylet
    ]


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_lost_node_costs_no_job(tmp_path: Path, pictures: Path, tiny_base: Path, cluster: Any) -> None:
    second = cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False)
    (raylet,) = [info.process.pid for infos in second.all_processes.values() for info in infos
                 if "raylet" in str(info.process.args)]  # fmt: skip
    output, lost = tmp_path / "out", []

    def kill_when_busy() -> bool:
        if not lost and (found := running_on(raylet, output)):
            lost.extend(found)
            cluster.remove_node(second, allow_graceful=False)
        return False

    begin = time.monotonic()
    engine = RayEngine(output, cluster.address, None)
    jobs = read_jobs(jobs_file(tmp_path, pictures, tiny_base))
    *_, standing = run_batch(jobs, output, engine, retry=False, should_stop=kill_when_busy)
    assert lost, f"no job ran on the second node in {time.monotonic() - begin:.0f} s"
    assert (len(standing["done"]), standing["failed"], standing["open"]) == (8, [], [])
    for name in lost:
        log = (output / name / "log.txt").read_text(encoding="utf-8")
        (resumed,) = [line for line in log.splitlines() if "Resumed at step" in line]
        assert int(resumed.partition("Resumed at step ")[2].split()[0]) >= 5
        rows = [json.loads(line) for line in (output / name / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows if row["event"] == "step"] == list(range(1, 201))


def test_without_ray_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import sys

    from sdlora.errors import ConfigError

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match="pip install"):
        RayEngine(tmp_path, None, None)
