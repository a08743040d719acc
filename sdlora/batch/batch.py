"""The order of a batch: what is to be done, who does it, what became of it, and the report in the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Literal

from sdlora.batch.engine import Engine
from sdlora.batch.fingerprint import Fingerprints
from sdlora.batch.jobs import Job
from sdlora.batch.ledger import Ledger, Record, locked
from sdlora.batch.location import LEDGER, Location
from sdlora.batch.messages import Message, Task
from sdlora.errors import SdloraError, StoreError

Action = Literal["skip", "resume", "start", "fault"]


def run_batch(
    jobs: Sequence[Job], location: Location, engine: Engine, *, retry: bool, should_stop: Callable[[], bool]
) -> Iterator[Message]:
    """Carry out what is left to do of a batch.

    Args:
        jobs: In the order of their turn.
        location: The batch's; each job's run is in it.
        engine: Who carries them out.
        retry: Whether jobs that failed before are tried again.
        should_stop: True lets what runs save itself; the same call later goes on.

    Yields:
        "planned" for every job, the engine's messages, and at last "batch" with the names of those that are done,
        failed and left open.

    Raises:
        OutputError: The folder cannot be used, or another process works in it.
        StoreError: The batch's URL does not answer at the beginning or in the end.
    """
    with locked(location.folder):
        location.fetch()
        ledger = Ledger.read(location.folder)
        tasks = []
        for job, fingerprint in _fingerprinted(jobs):
            action, record = decide(job, ledger.records.get(job.name), fingerprint, retry=retry)
            message: Message = {"job": job.name, "event": "planned", "action": action, "status": record.outcome[0]}
            if action == "start" and (moved := location.move_aside(job.name)):
                message["moved"] = moved
            ledger.put(job.name, record)
            yield message | {"error": record.outcome[1]}
            if action in ("start", "resume") and job.config is not None:
                tasks.append(Task(job.name, job.config.model_dump(mode="json"), location.run(job.name)))
        location.keep(LEDGER)
        for message in engine.run(tasks, should_stop):
            _record(ledger, message)
            yield message
            if message["event"] == "ended":
                yield from _kept(location, message["job"])
        _write_report(jobs, ledger, location)
        yield {"event": "batch", "folder": location.output, **_standing(ledger, jobs)}


def decide(job: Job, record: Record | None, fingerprint: str, *, retry: bool) -> tuple[Action, Record]:
    """What to do with a job, and its record as it now is.

    Args:
        job: The job.
        record: What is known of it from earlier calls, or None.
        fingerprint: What it would be made from now.
        retry: Whether a failed one is tried again.
    """
    if job.config is None:
        return "fault", replace(record or Record(), fault=job.fault)
    if record is None or record.fingerprint != fingerprint:
        return "start", Record("waiting", fingerprint)
    if record.status == "done" or (record.status == "failed" and not retry):
        return "skip", replace(record, fault=None)
    # "running" is what a call that was killed itself leaves behind.
    status = "cut" if record.status == "running" else record.status
    return "resume", replace(record, status=status, fault=None)


def _fingerprinted(jobs: Sequence[Job]) -> Iterator[tuple[Job, str]]:
    fingerprints = Fingerprints()
    for job in jobs:
        try:
            yield job, "" if job.config is None else fingerprints.of(job.config)
        except StoreError as error:
            # Its images may be the same as before: nothing is started anew for want of an answer.
            yield replace(job, config=None, fault=str(error)), ""
        except SdloraError:
            yield job, "no such set"  # the run itself says so, and is that job's failure


def _kept(location: Location, job: str) -> Iterator[Message]:
    try:
        location.keep(LEDGER)
    except StoreError as error:
        yield {"job": job, "event": "notice", "message": f"{error} The batch goes on; its record is put there later."}


def _record(ledger: Ledger, message: Message) -> None:
    if message["event"] == "started":
        ledger.put(message["job"], replace(ledger.records[message["job"]], status="running"))
    elif message["event"] == "ended":
        before = ledger.records[message["job"]]
        peaks = [peak for peak in (before.peak_memory_bytes, message["peak_memory_bytes"]) if peak is not None]
        after = replace(
            before,
            **{key: message[key] for key in ("status", "error", "exit_code", "epoch")},
            seconds=before.seconds + message["seconds"],
            peak_memory_bytes=max(peaks, default=None),
        )
        ledger.put(message["job"], after)


def _write_report(jobs: Sequence[Job], ledger: Ledger, location: Location) -> None:
    # Only now: what reads the runs loads torch and diffusers, which takes seconds.
    from sdlora.batch.page import write_page
    from sdlora.batch.results import TABLES, collect, write_tables

    runs = {
        job.name: location.run_here(job.name, record.epoch)
        for job in jobs
        if (record := ledger.records[job.name]).outcome[0] == "done" and record.epoch is not None
    }
    results = collect(jobs, ledger, runs)
    write_tables(ledger.folder, results)
    write_page(ledger.folder / "report.html", location.name, results, runs)
    location.keep(LEDGER, *TABLES, "report.html")


def _standing(ledger: Ledger, jobs: Sequence[Job]) -> dict[str, list[str]]:
    def named(*statuses: str) -> list[str]:
        return [job.name for job in jobs if ledger.records[job.name].outcome[0] in statuses]

    return {"done": named("done"), "failed": named("failed", "cut"), "open": named("waiting", "running", "stopped")}
