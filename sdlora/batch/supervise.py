"""The order of a batch: what is to be done, who does it, what became of it, and the report in the end.

Floor 7.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from sdlora.batch.engine import Engine
from sdlora.batch.fingerprint import Fingerprints
from sdlora.batch.jobs import Job
from sdlora.batch.ledger import Ledger, Record, locked
from sdlora.batch.messages import Message, Task
from sdlora.errors import SdloraError

Action = Literal["skip", "resume", "start", "fault"]


def run_batch(
    jobs: Sequence[Job], output: Path, engine: Engine, *, retry: bool, should_stop: Callable[[], bool]
) -> Iterator[Message]:
    """Carry out what is left to do of a batch.

    Args:
        jobs: In the order of their turn.
        output: The batch's folder; each job's run folder is in it.
        engine: Who carries them out.
        retry: Whether jobs that failed before are tried again.
        should_stop: True lets what runs save itself; the same call later goes on.

    Yields:
        "planned" for every job, the engine's messages, and at last "batch" with the names of those that are done,
        failed and left open.

    Raises:
        OutputError: The folder cannot be used, or another process works in it.
    """
    with locked(output):
        ledger = Ledger.read(output)
        tasks = []
        for job, fingerprint in zip(jobs, _fingerprints(jobs), strict=True):
            action, record = decide(job, ledger.records.get(job.name), fingerprint, retry=retry)
            message: Message = {"job": job.name, "event": "planned", "action": action, "status": record.outcome[0]}
            folder = output / job.name
            if action == "start" and folder.exists():
                message["moved"] = str(_move_aside(folder))
            ledger.put(job.name, record)
            yield message | {"error": record.outcome[1]}
            if action in ("start", "resume") and job.config is not None:
                tasks.append(Task(job.name, job.config.model_dump(mode="json"), str(folder)))
        for message in engine.run(tasks, should_stop):
            _keep(ledger, message)
            yield message
        _write_report(jobs, ledger)
        yield {"event": "batch", "folder": str(output), **_standing(ledger, jobs)}


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


def _fingerprints(jobs: Sequence[Job]) -> Iterator[str]:
    fingerprints = Fingerprints()
    for job in jobs:
        try:
            yield "" if job.config is None else fingerprints.of(job.config)
        except SdloraError:
            yield "no such set"  # the run itself says so, and is that job's failure


def _move_aside(folder: Path) -> Path:
    """Keep what was made from other settings or pictures: nothing that a person waited for is deleted."""
    number = 1
    while (target := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    return folder.rename(target)


def _keep(ledger: Ledger, message: Message) -> None:
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


def _write_report(jobs: Sequence[Job], ledger: Ledger) -> None:
    # Only now: what reads the runs loads torch and diffusers, which takes seconds.
    from sdlora.batch.batchpage import write_page
    from sdlora.batch.results import collect, write_tables

    results = collect(jobs, ledger)
    write_tables(ledger.folder, results)
    write_page(ledger.folder, results)


def _standing(ledger: Ledger, jobs: Sequence[Job]) -> dict[str, list[str]]:
    def named(*statuses: str) -> list[str]:
        return [job.name for job in jobs if ledger.records[job.name].outcome[0] in statuses]

    return {"done": named("done"), "failed": named("failed", "cut"), "open": named("waiting", "running", "stopped")}
