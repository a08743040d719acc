"""A whole batch with real workers: one job's failure is its own, and nothing is done twice."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

import pytest
from helpers.batches import QUICK

from sdlora.batch.batch import decide, run_batch
from sdlora.batch.engine import Message, run_here
from sdlora.batch.jobs import Job, read_jobs
from sdlora.batch.location import Ledger, Location, Record
from sdlora.config.schema import RunConfig
from sdlora.config.toml import load_config
from sdlora.events import RunDone
from sdlora.run.run import start

JOBS = """
[defaults]
config = "{folder}/quick.toml"
[defaults.set]
"data.folder" = "{images}"
"cache.dir" = "{folder}/cache"
[[jobs]]
name = "wrong"
set = {{ "lora.rank" = {rank} }}
[[jobs]]
name = "killed"
set = {{ "seed" = 1, "data.repeats" = 30 }}
[[jobs]]
name = "plain"
[sweep]
"""


def write_jobs(folder: Path, images: Path, base: str, *, rank: int = 999) -> Path:
    quick = folder / "quick.toml"
    quick.write_text(f'{QUICK}\n[base]\npath = "{base}"\n', encoding="utf-8")
    file = folder / "jobs.toml"
    more = "".join(f'[[jobs]]\nname = "j{i}"\nset = {{ "seed" = {i} }}\n' for i in (2, 3, 4))
    text = JOBS.format(folder=folder, images=images, rank=rank).replace("[sweep]\n", more)
    file.write_text(text, encoding="utf-8")
    return file


def messages(file: Path, *, retry: bool = False, stop: Callable[[], bool] = lambda: False) -> Iterator[Message]:
    output = file.parent / "out"
    engine = partial(run_here, logs=output / "workers", environments=[{}])
    return run_batch(read_jobs(file), Location(str(output)), engine, retry=retry, should_stop=stop)


def tensors(file: Path) -> str:
    """A hash of a LoRA file without its header, which holds the time of writing."""
    content = file.read_bytes()
    return hashlib.sha256(content[8 + int.from_bytes(content[:8], "little") :]).hexdigest()


@pytest.mark.slow
def test_invalid_and_killed_jobs_do_not_affect_the_others(tmp_path: Path, images: Path, tiny_base: Path) -> None:
    file = write_jobs(tmp_path, images, str(tiny_base))
    seen, killed = [], False
    for message in messages(file):
        seen.append(message)
        if not killed and message.get("job") == "killed" and message["event"] == "step" and message["step"] >= 6:
            os.kill(json.loads((tmp_path / "out/killed/state.json").read_text())["pid"], signal.SIGKILL)
            killed = True
    others = ["plain", "j2", "j3", "j4"]
    assert (seen[-1]["done"], seen[-1]["failed"], seen[-1]["open"]) == (others, ["wrong", "killed"], [])
    records = json.loads((tmp_path / "out/batch.json").read_text())["jobs"]
    assert "lora.rank: found 999" in records["wrong"]["fault"]
    assert (records["killed"]["status"], records["killed"]["exit_code"]) == ("cut", 137)
    assert "SIGKILL" in records["killed"]["error"]
    page = (tmp_path / "out/report.html").read_text(encoding="utf-8")
    assert "4 of 6 jobs are done" in page and "wrong (failed), killed (cut)" in page
    made = {name: (tmp_path / f"out/{name}/{name}.safetensors").stat().st_mtime_ns for name in others}

    write_jobs(tmp_path, images, str(tiny_base), rank=3)
    seen = list(messages(file))
    actions = {m["job"]: m["action"] for m in seen if m["event"] == "planned"}
    assert actions == {"wrong": "start", "killed": "resume"} | dict.fromkeys(others, "skip")
    assert {m["job"] for m in seen if m["event"] == "started"} == {"wrong", "killed"}
    steps = [m["step"] for m in seen if m["event"] == "step" and m["job"] == "killed"]
    assert steps[0] > 1, "it went on from its checkpoint"
    assert seen[-1]["done"] == ["wrong", "killed", *others]
    assert made == {name: (tmp_path / f"out/{name}/{name}.safetensors").stat().st_mtime_ns for name in others}
    # The third call has nothing left to do.
    assert {m["event"] for m in messages(file)} == {"planned", "batch"}
    # The last job was trained on a base that others were trained on before; a fresh one gives the same LoRA.
    changes = [f"data.folder={images}", f"cache.dir={tmp_path}/cache", "seed=4", "name=j4"]
    config = load_config(str(tmp_path / "quick.toml"), changes)
    assert [type(event) for event in start(config, tmp_path / "alone")][-1] is RunDone
    assert tensors(tmp_path / "alone/j4.safetensors") == tensors(tmp_path / "out/j4/j4.safetensors")


def test_stopped_jobs_are_resumable(tmp_path: Path, images: Path, tiny_base: Path) -> None:
    file = write_jobs(tmp_path, images, str(tiny_base), rank=4)
    stopping: list[bool] = []
    seen = []
    for message in messages(file, stop=lambda: bool(stopping)):
        seen.append(message)
        if message.get("job") == "killed" and message["event"] == "step":
            stopping.append(True)
    assert seen[-1]["done"] == ["wrong"]
    assert seen[-1]["open"] == ["killed", "plain", "j2", "j3", "j4"]
    assert json.loads((tmp_path / "out/killed/state.json").read_text())["status"] == "stopped"
    actions = [message["action"] for message in islice(messages(file), 6)]
    assert actions == ["skip", "resume", "resume", "resume", "resume", "resume"]


def test_changed_job_restarts_and_its_old_run_is_kept(tmp_path: Path, images: Path, tiny_base: Path) -> None:
    file = write_jobs(tmp_path, images, str(tiny_base))
    old = tmp_path / "out/plain"
    old.mkdir(parents=True)
    (old / "notes.txt").write_text("mine")
    Ledger(tmp_path / "out").put("plain", Record("done", "of other settings"))
    planned = {m["job"]: m for m in islice(messages(file), 6)}
    assert planned["plain"]["action"] == "start"
    assert (tmp_path / "out/plain.1/notes.txt").read_text() == "mine"
    assert "moved" not in planned["j2"]


JOB = Job("a", 0, {}, RunConfig())


@pytest.mark.parametrize(
    ("record", "retry", "action"),
    [
        (None, False, "start"),
        (Record("done", "x"), False, "skip"),
        (Record("done", "x"), True, "skip"),
        (Record("done", "other"), False, "start"),
        (Record("failed", "x"), False, "skip"),
        (Record("failed", "x"), True, "resume"),
        (Record("failed", "other"), False, "start"),
        (Record("cut", "x"), False, "resume"),
        (Record("running", "x"), False, "resume"),
        (Record("stopped", "x"), False, "resume"),
        (Record("waiting", "x"), False, "resume"),
    ],
)
def test_action_follows_from_record_and_fingerprint(record: Record | None, retry: bool, action: str) -> None:
    assert decide(JOB, record, "x", retry=retry)[0] == action


def test_job_with_invalid_settings_keeps_its_earlier_record() -> None:
    wrong = replace(JOB, config=None, fault="lora.rank: no")
    assert decide(wrong, None, "", retry=True)[1].outcome == ("failed", "lora.rank: no")
    action, record = decide(wrong, Record("done", "x", epoch=3), "", retry=True)
    assert (action, record.outcome) == ("fault", ("failed", "lora.rank: no"))
    assert decide(JOB, record, "x", retry=False) == ("skip", Record("done", "x", epoch=3))
