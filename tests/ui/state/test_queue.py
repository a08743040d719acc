"""One process for every device, whoever asks how often; a queue that a person can change; and how a run stands."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import psutil
import pytest
from helpers.studios import write_state

from sdlora.common.run_files import RunState
from sdlora.config.schema import RunConfig
from sdlora.errors import SdloraError
from sdlora.ui.html.render import progress_words
from sdlora.ui.pages.context import Context, snapshot
from sdlora.ui.state import queue
from sdlora.ui.state.folders import Studio
from sdlora.ui.state.queue import Job, Jobs, Status, last_lines

Make = Callable[..., RunConfig]


def end(process: psutil.Process) -> None:
    process.terminate()
    # The job's own process reaps it; here it is enough that it is gone or a zombie.
    psutil.wait_procs([process], timeout=10)


def test_two_clicks_start_one_run(context: Context, make_config: Make, sleepers: list[psutil.Process]) -> None:
    told = [context.jobs.add(make_config("a")) for _ in range(2)]
    assert told == ["'a' has started.", "'a' was already started."]
    assert len(sleepers) == 1
    with pytest.raises(SdloraError, match="another name"):
        context.jobs.add(make_config("a", epochs=2))


def test_the_queue_has_an_end(
    context: Context, make_config: Make, sleepers: list[psutil.Process], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue, "MOST_WAITING", 1)
    context.jobs.add(make_config("a"))
    context.jobs.add(make_config("b"))
    with pytest.raises(SdloraError, match="Remove some"):
        context.jobs.add(make_config("c"))


def test_twenty_starts_at_once_in_several_studios_start_one(
    studio: Studio, make_config: Make, sleepers: list[psutil.Process]
) -> None:
    barrier, config = threading.Barrier(20), make_config("a")

    def click() -> None:
        jobs = Jobs(studio)
        barrier.wait()
        jobs.add(config)

    threads = [threading.Thread(target=click) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(sleepers) == 1


def test_next_job_starts_when_the_device_is_free(
    context: Context, make_config: Make, sleepers: list[psutil.Process]
) -> None:
    for name in "abc":
        context.jobs.add(make_config(name))
    assert [context.jobs.status(name).position for name in "abc"] == [None, 1, 2]
    context.jobs.dispatch()
    assert len(sleepers) == 1
    end(sleepers[0])
    context.jobs.dispatch()
    assert [context.jobs.status(name).word for name in "abc"] == ["failed", "starting", "waiting"]


def test_jobs_on_other_devices_do_not_wait(context: Context, make_config: Make, sleepers: list[psutil.Process]) -> None:
    for name, device in (("a", "cuda:0"), ("b", "cuda"), ("c", "cuda:1"), ("d", "auto")):
        context.jobs.add(make_config(name, device=device))
    assert [context.jobs.status(name).word for name in "abcd"] == ["starting", "waiting", "starting", "starting"]


def test_run_from_the_command_line_occupies_its_device(
    context: Context, studio: Studio, make_config: Make, sleepers: list[psutil.Process]
) -> None:
    write_state(studio, make_config("mine"), pid=psutil.Process().pid)
    assert context.jobs.status("mine").word == "running"
    context.jobs.add(make_config("a"))
    assert context.jobs.status("a").word == "waiting"
    assert not sleepers


def test_queue_can_be_reordered_and_jobs_cancelled(
    context: Context, make_config: Make, sleepers: list[psutil.Process]
) -> None:
    for name in "abcd":
        context.jobs.add(make_config(name))
    context.jobs.move("d", -1)
    context.jobs.move("b", 1)
    assert [job.name for job in context.jobs.waiting()] == ["d", "b", "c"]
    context.jobs.move("d", -1)
    context.jobs.cancel("b")
    assert [job.name for job in Jobs(context.studio).waiting()] == ["d", "c"]
    with pytest.raises(SdloraError, match="'a' is not in the queue"):
        context.jobs.cancel("a")
    end(sleepers[0])
    context.jobs.dispatch()
    assert [context.jobs.status(name).word for name in ("d", "c")] == ["starting", "waiting"]


def test_stopped_job_can_be_resumed(context: Context, make_config: Make, sleepers: list[psutil.Process]) -> None:
    context.jobs.add(make_config("a"))
    assert "Stopping" in context.jobs.stop("a")
    assert context.jobs.status("a").word in ("stopping", "stopped")
    psutil.wait_procs(sleepers, timeout=10)
    context.jobs.dispatch()
    assert context.jobs.status("a").word == "stopped"
    with pytest.raises(SdloraError, match="'a' is not running"):
        context.jobs.stop("a")
    assert context.jobs.resume("a") == "'a' has started."
    assert "starting" in context.jobs.resume("a")
    assert len(sleepers) == 2


def test_stopped_run_is_resumed_with_its_own_settings(
    context: Context, studio: Studio, make_config: Make, sleepers: list[psutil.Process]
) -> None:
    folder = write_state(studio, make_config("a"), status="stopped")
    context.jobs.resume("a")
    said = studio.log("a").read_text(encoding="utf-8")
    assert said == f"started with train {folder / 'config.toml'} --output {folder} --json --resume\n"


def test_paused_job_keeps_its_device_and_continues(
    context: Context, make_config: Make, sleepers: list[psutil.Process]
) -> None:
    context.jobs.add(make_config("a"))
    context.jobs.pause("a")
    assert context.jobs.status("a").word == "paused"
    context.jobs.add(make_config("b"))
    assert context.jobs.status("b").word == "waiting"
    context.jobs.proceed("a")
    assert context.jobs.status("a").word == "starting"
    context.jobs.pause("a")
    context.jobs.stop("a")
    gone, _ = psutil.wait_procs(sleepers, timeout=10)
    assert gone, "a paused run hears of its stop"


def test_done_run_is_not_resumed_and_running_one_not_forgotten(
    context: Context, studio: Studio, make_config: Make, sleepers: list[psutil.Process]
) -> None:
    write_state(studio, make_config("old"), status="done")
    with pytest.raises(SdloraError, match="Clone it"):
        context.jobs.resume("old")
    context.jobs.add(make_config("a"))
    with pytest.raises(SdloraError, match="Stop it first"):
        context.jobs.forget("a")
    with pytest.raises(SdloraError, match="no run"):
        context.jobs.resume("never")


# --- How a run stands, whatever became of its process -----------------------------------------------------------------


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


def test_an_odd_folder_is_one_row_and_stops_nothing(
    context: Context, studio: Studio, make_config: Make, sleepers: list[psutil.Process]
) -> None:
    write_state(studio, make_config("fine"), status="done")
    shutil.copytree(studio.run("fine"), studio.runs / "fine (copy)")
    (write_state(studio, make_config("empty")) / "state.json").write_text("")
    later = write_state(studio, make_config("later")) / "config.toml"
    later.write_text(f"{later.read_text()}\n[hologram]\ndepth = 3\n", encoding="utf-8")
    (write_state(studio, make_config("torn")) / "metrics.jsonl").write_text("[]\n")
    for name, content in (("fine (copy)", "{}"), ("broken", ""), ("other", '{"name": 3}')):
        (studio.jobs / f"{name}.json").write_text(content)
    shown = snapshot(context, None, None)
    assert shown.names == ["fine"] and context.default_run() == "fine"
    odd = {status.name: status.error or "" for status in context.statuses() if status.word == "unreadable"}
    assert odd.keys() == {"fine (copy)", "empty", "later", "torn"}
    assert "Rename" in odd["fine (copy)"] and "state.json" in odd["empty"] and "hologram" in odd["later"]
    assert shown.html["cards"].count("unreadable-run") == 4 and "Rename" in shown.html["cards"]
    assert all("cannot be read" in snapshot(context, name, None).html["status"] for name in odd)
    assert "has started" in context.jobs.add(make_config("new")) and len(sleepers) == 1


@pytest.mark.parametrize("name", ["bases", "Pictures"])
def test_folders_of_the_studio_are_no_runs(context: Context, make_config: Make, name: str) -> None:
    with pytest.raises(SdloraError, match="reserved"):
        context.jobs.add(make_config(name))


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
        ("more previews", 0, 2, 12, "generating more previews, to be sure, 2 of 12, about 1 min 30 s left"),
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
