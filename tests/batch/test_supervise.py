"""A whole batch through the real command: one job's failure is its own, and nothing is done twice."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sdlora.batch.jobs import Job
from sdlora.batch.ledger import Record
from sdlora.batch.supervise import decide
from sdlora.config import RunConfig

QUICK = """
[data]
repeats = 8
[train]
epochs = 2
batch_size = 2
checkpoint_every_steps = 4
log_every_steps = 1
[lora]
rank = 2
[preview]
num_steps = 2
seeds = [0]
num_captions = 0
prompts = ["a ball"]
[copycheck]
enabled = false
"""

JOBS = """
[defaults]
config = "{folder}/quick.toml"
[defaults.set]
"data.folder" = "{pictures}"
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


def write_jobs(folder: Path, pictures: Path, base: str, *, rank: int = 999) -> Path:
    quick = folder / "quick.toml"
    quick.write_text(f'{QUICK}\n[base]\npath = "{base}"\n', encoding="utf-8")
    file = folder / "jobs.toml"
    more = "".join(f'[[jobs]]\nname = "j{i}"\nset = {{ "seed" = {i} }}\n' for i in (2, 3, 4))
    text = JOBS.format(folder=folder, pictures=pictures, rank=rank).replace("[sweep]\n", more)
    file.write_text(text, encoding="utf-8")
    return file


def start_batch(file: Path, *flags: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "sdlora", "batch", str(file), "--output", str(file.parent / "out"), "--json"]
    return subprocess.Popen(
        [*command, *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def ended(process: subprocess.Popen[str]) -> tuple[int, list[dict[str, Any]], str]:
    out, err = process.communicate(timeout=300)
    return process.returncode, [json.loads(line) for line in out.splitlines()], err


def tensors(file: Path) -> str:
    """A hash of a LoRA file without its header, which holds the time of writing."""
    content = file.read_bytes()
    return hashlib.sha256(content[8 + int.from_bytes(content[:8], "little") :]).hexdigest()


def test_a_bad_and_a_killed_job_leave_the_other_four_alone(tmp_path: Path, pictures: Path, tiny_base: Path) -> None:
    file = write_jobs(tmp_path, pictures, str(tiny_base))
    process = start_batch(file)
    assert process.stdout is not None
    for line in process.stdout:
        message = json.loads(line)
        if message.get("job") == "killed" and message["event"] == "step" and message["step"] >= 6:
            os.kill(json.loads((tmp_path / "out/killed/state.json").read_text())["pid"], signal.SIGKILL)
            break
    code, messages, err = ended(process)
    others = ["plain", "j2", "j3", "j4"]
    assert code == 8, err
    assert messages[-1]["done"] == others
    assert messages[-1]["failed"] == ["wrong", "killed"]
    assert "2 failed: wrong, killed." in err
    records = json.loads((tmp_path / "out/batch.json").read_text())["jobs"]
    assert (records["wrong"]["status"], records["wrong"]["exit_code"]) == ("failed", 2)
    assert "lora.rank: found 999" in records["wrong"]["error"]
    assert (records["killed"]["status"], records["killed"]["exit_code"]) == ("cut", 137)
    assert "SIGKILL" in records["killed"]["error"]
    made = {name: (tmp_path / f"out/{name}/{name}.safetensors").stat().st_mtime_ns for name in others}

    write_jobs(tmp_path, pictures, str(tiny_base), rank=3)
    code, messages, err = ended(start_batch(file))
    assert code == 0, err
    actions = {m["job"]: m["action"] for m in messages if m["event"] == "planned"}
    assert actions == {"wrong": "start", "killed": "resume"} | dict.fromkeys(others, "skip")
    assert {m["job"] for m in messages if m["event"] == "started"} == {"wrong", "killed"}
    steps = [m["step"] for m in messages if m["event"] == "step" and m["job"] == "killed"]
    assert steps[0] > 1, "it went on from its checkpoint"
    assert made == {name: (tmp_path / f"out/{name}/{name}.safetensors").stat().st_mtime_ns for name in others}
    # The third call has nothing left to do.
    code, messages, _ = ended(start_batch(file))
    assert code == 0
    assert {m["event"] for m in messages} == {"planned", "batch"}


def test_a_kept_base_gives_what_a_fresh_one_gives(tmp_path: Path, pictures: Path, tiny_base: Path) -> None:
    file = write_jobs(tmp_path, pictures, str(tiny_base), rank=4)
    code, _, err = ended(start_batch(file))
    assert code == 0, err
    alone = tmp_path / "alone"
    command = [
        sys.executable, "-m", "sdlora", "train", str(tmp_path / "quick.toml"), "--output", str(alone),
        *(f"--set={s}" for s in (f"data.folder={pictures}", f"cache.dir={tmp_path}/cache", "seed=4", "name=j4")),
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    assert tensors(alone / "j4.safetensors") == tensors(tmp_path / "out/j4/j4.safetensors")


def test_ctrl_c_leaves_everything_resumable(tmp_path: Path, pictures: Path, tiny_base: Path) -> None:
    file = write_jobs(tmp_path, pictures, str(tiny_base), rank=4)
    process = start_batch(file)
    assert process.stdout is not None
    for line in process.stdout:
        message = json.loads(line)
        if message.get("job") == "killed" and message["event"] == "step":
            os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to every process of the group
            break
    code, messages, err = ended(process)
    assert code == 130, err
    assert "The same command goes on" in err
    assert messages[-1]["done"] == ["wrong"]
    assert messages[-1]["open"] == ["killed", "plain", "j2", "j3", "j4"]
    assert json.loads((tmp_path / "out/killed/state.json").read_text())["status"] == "stopped"
    code, messages, err = ended(start_batch(file))
    assert code == 0, err
    assert "wrong" not in {m["job"] for m in messages if m["event"] == "started"}


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
def test_what_is_done_with_a_job(record: Record | None, retry: bool, action: str) -> None:
    assert decide(JOB, record, "x", retry=retry)[0] == action


def test_wrong_settings_are_a_failure_whatever_was_before() -> None:
    wrong = replace(JOB, config=None, fault="lora.rank: no")
    assert decide(wrong, Record("done", "x"), "", retry=True) == ("fault", Record("failed", "", "lora.rank: no", 2))
