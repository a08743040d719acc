"""A batch from start to end: which jobs are left, who runs them, what became of them, and the report.

Called by `sdlora batch`; hands tasks to an engine and keeps the ledger.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Literal

from sdlora.batch.engine import Engine, Message, Task
from sdlora.batch.jobs import Fingerprints, Job
from sdlora.batch.location import LEDGER, Ledger, Location, Record, locked
from sdlora.errors import SdloraError, StoreError

Action = Literal["skip", "resume", "start", "fault"]


def run_batch(
    jobs: Sequence[Job], location: Location, engine: Engine, *, retry: bool, should_stop: Callable[[], bool]
) -> Iterator[Message]:
    """Run the jobs of a batch that are not done yet, in their order.

    Args:
        retry: Whether to retry jobs that failed before.
        should_stop: True makes running jobs save their state and end; the same call resumes them.

    Yields:
        "planned" for every job, the engine's messages, and finally "batch" with the names of the jobs that are done,
        failed and open.

    Raises:
        OutputError: The folder cannot be used, or another process works in it.
        StoreError: The batch's URL does not answer at the start or at the end.
    """
    with locked(location.folder):
        location.download_ledger()
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
        location.upload(LEDGER)
        for message in engine(tasks, should_stop):
            _record(ledger, message)
            yield message
            if message["event"] == "ended":
                try:
                    location.upload(LEDGER)
                except StoreError as error:
                    notice = f"{error} The batch continues; its record is uploaded later."
                    yield {"job": message["job"], "event": "notice", "message": notice}
        _write_report(jobs, ledger, location)
        named: dict[str, list[str]] = {"done": [], "failed": [], "open": []}
        for job in jobs:
            status = ledger.records[job.name].outcome[0]
            named["done" if status == "done" else "failed" if status in ("failed", "cut") else "open"].append(job.name)
        yield {"event": "batch", "folder": location.output, **named}


def decide(job: Job, record: Record | None, fingerprint: str, *, retry: bool) -> tuple[Action, Record]:
    """Choose what to do with a job, and update its record.

    Args:
        record: From earlier calls, or None.
        fingerprint: Of the job's current settings, images and base.
        retry: Whether to retry a failed job.
    """
    if job.config is None:
        return "fault", replace(record or Record(), fault=job.fault)
    if record is None or record.fingerprint != fingerprint:
        return "start", Record("waiting", fingerprint)
    if record.status == "done" or (record.status == "failed" and not retry):
        return "skip", replace(record, fault=None)
    # A batch that was killed leaves "running" behind.
    status = "cut" if record.status == "running" else record.status
    return "resume", replace(record, status=status, fault=None)


def _fingerprinted(jobs: Sequence[Job]) -> Iterator[tuple[Job, str]]:
    fingerprints = Fingerprints()
    for job in jobs:
        try:
            yield job, "" if job.config is None else fingerprints.of(job.config)
        except StoreError as error:
            # The images may be unchanged: a store that does not answer must not restart the job.
            yield replace(job, config=None, fault=str(error)), ""
        except SdloraError:
            yield job, "no such set"  # the run reports it as the failure of this job


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
    # Imported only now: these load torch and diffusers, which takes seconds.
    from sdlora.batch.results import TABLES, collect, write_page, write_tables

    runs = {
        job.name: location.run_here(job.name, record.epoch)
        for job in jobs
        if (record := ledger.records[job.name]).outcome[0] == "done" and record.epoch is not None
    }
    results = collect(jobs, ledger, runs)
    write_tables(ledger.folder, results)
    write_page(ledger.folder / "report.html", location.name, results, runs)
    location.upload(LEDGER, *TABLES, "report.html")
