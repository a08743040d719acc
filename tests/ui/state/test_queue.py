"""One process for every device, whoever asks how often; and a queue that a person can change."""

from __future__ import annotations

import threading
from collections.abc import Callable

import psutil
import pytest
from helpers.studios import write_state

from sdlora.config.schema import RunConfig
from sdlora.errors import SdloraError
from sdlora.ui.pages.context import Context
from sdlora.ui.state.folders import Studio
from sdlora.ui.state.queue import Jobs

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
