"""How a run stands, whatever became of its process."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable

import psutil
import pytest
from helpers.studios import write_state

from sdlora.common.run_state import RunState
from sdlora.config.schema import RunConfig
from sdlora.ui.html.render import progress_words
from sdlora.ui.pages.context import Context
from sdlora.ui.state.folders import Studio
from sdlora.ui.state.run_status import Job, Status, last_lines

Make = Callable[..., RunConfig]


@pytest.mark.parametrize("word", ["done", "stopped"])
def test_status_of_an_ended_run_is_its_last_state(
    context: Context, studio: Studio, make_config: Make, word: str
) -> None:
    write_state(studio, make_config("a"), status=word)
    assert context.jobs.status("a").word == word


def test_run_whose_process_died_has_failed(context: Context, studio: Studio, make_config: Make) -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    folder = write_state(studio, make_config("a"), pid=child.pid)
    (folder / "log.txt").write_text("one\n\x1b[31mtwo\x1b[0m\n", encoding="utf-8")
    status = context.jobs.status("a")
    assert (status.word, status.can_resume) == ("failed", True)
    assert "killed" in (status.error or "")
    assert status.log == "one\ntwo"


def test_zombie_process_counts_as_dead(context: Context, studio: Studio, make_config: Make) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
    write_state(studio, make_config("a"), pid=child.pid)
    assert context.jobs.status("a").word == "running"
    child.kill()
    process = psutil.Process(child.pid)
    while process.status() != psutil.STATUS_ZOMBIE:
        pass
    assert context.jobs.status("a").word == "failed"
    child.wait()


def test_reused_pid_is_not_the_run(context: Context, studio: Studio, make_config: Make) -> None:
    long_ago = time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(psutil.Process().create_time() - 100))
    write_state(studio, make_config("a"), pid=psutil.Process().pid, started=long_ago)
    assert context.jobs.status("a").word == "failed"


def test_job_is_identified_by_start_time(context: Context, studio: Studio, make_config: Make) -> None:
    me = psutil.Process()
    for began, word in ((me.create_time(), "starting"), (me.create_time() - 100, "failed")):
        context.jobs._write(Job("a", "cpu", 1.0, "started", pid=me.pid, began=began))
        assert context.jobs.status("a").word == word


def test_state_of_an_earlier_attempt_is_ignored(
    context: Context, studio: Studio, make_config: Make, sleepers: list[psutil.Process]
) -> None:
    long_ago = time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(time.time() - 100))
    write_state(studio, make_config("a"), status="stopped", started=long_ago)
    context.jobs.resume("a")
    assert context.jobs.status("a").word == "starting"
    sleepers[0].kill()
    psutil.wait_procs(sleepers, timeout=10)
    status = context.jobs.status("a")
    assert status.word == "failed" and "before training" in (status.error or "")
    assert "started with" in status.log


def test_unknown_run_has_no_status(context: Context) -> None:
    assert context.jobs.status("nothing").word == "none"


def test_only_the_end_of_a_log_is_read(studio: Studio) -> None:
    log = studio.log("a")
    log.write_text("\n".join(f"line {number}" for number in range(100_000)), encoding="utf-8")
    lines = last_lines(log).splitlines()
    assert lines[-1] == "line 99999" and len(lines) == 12


@pytest.mark.parametrize(
    ("phase", "step", "done", "total", "told"),
    [
        ("the base's pictures", 0, 32, 68, "generating images with the base model, 32 of 68, about 1 min 30 s left"),
        ("page", 0, 1, 1, "training, step 0 of 40, about 1 min 30 s left"),
        ("train", 9, 9, 40, "training, step 9 of 40, about 1 min 30 s left"),
        ("page", 40, 1, 1, "writing the report, about 1 min 30 s left"),
    ],
)
def test_progress_names_phase_and_time_left(phase: str, step: int, done: int, total: int, told: str) -> None:
    state = RunState(
        phase=phase, step=step, total_steps=40, done=done, total=total, eta_seconds=90.0, pid=1, started=""
    )
    assert progress_words(Status("a", "running", state)) == told
