"""Location of a batch, a folder or a URL with a local working folder, and the ledger of its jobs' status there.

Runs upload themselves from the machine they run on (`sdlora.common.remote.open_run`); this module moves the batch's
own files, and what the report reads of the runs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from sdlora.common.files import write_json
from sdlora.common.locks import hold
from sdlora.common.remote import Store, download_set, is_url, work_folder
from sdlora.errors import BusyError, OutputError

LEDGER = "batch.json"
_STOP = ".stop"  # not a valid job name

Status = Literal["waiting", "running", "done", "failed", "cut", "stopped"]


class Location:
    """The folder or URL of a batch.

    Attributes:
        output: As given.
        folder: Local folder for the batch's own files; for a URL, a working folder of this machine.
        name: Last part of the folder or URL.

    Raises:
        ConfigError: The URL cannot be used.
        StoreError: There is no driver for it.
    """

    def __init__(self, output: str) -> None:
        self._is_remote = is_url(output)
        output = output if self._is_remote else str(Path(output).expanduser())
        self._store = Store(output if self._is_remote else str(Path(output).absolute()))
        self.output = self._store.url if self._is_remote else output
        self.folder = work_folder(self._store) if self._is_remote else Path(output)
        self.name = Path(self._store.url).name

    def run(self, job: str) -> str:
        """The folder or URL of a job's run."""
        return f"{self.output}/{job}" if self._is_remote else str(self.folder / job)

    def run_here(self, job: str, epoch: int) -> Path:
        """A finished run as a local folder; from a URL, only the files that the report needs of one epoch."""
        if not self._is_remote:
            return self.folder / job
        needed = re.compile(rf"metrics\.jsonl|epochs/{epoch}/(copycheck\.json|previews/.*)")
        return download_set(self.run(job), needed.fullmatch)

    def download_ledger(self) -> None:
        """Download the ledger, which another machine may have written."""
        if self._is_remote:
            (self.folder / LEDGER).unlink(missing_ok=True)
            if self._store.has(LEDGER):
                self._store.download({LEDGER: self.folder / LEDGER})

    def upload(self, *names: str) -> None:
        """Upload files of the batch to its URL.

        Raises:
            StoreError: The store does not answer.
        """
        for name in names if self._is_remote else ():
            self._store.upload(self.folder / name, name)

    def move_aside(self, job: str) -> str | None:
        """Rename a run of other settings or images; returns its new location, None if there was no such run."""
        if not self._store.has(job):
            return None
        number = 1
        while self._store.has(f"{job}.{number}"):
            number += 1
        self._store.move(job, f"{job}.{number}")
        return self.run(f"{job}.{number}")

    def request_stop(self, stop: bool) -> None:
        """Ask the runs on all machines to save their state and end, or withdraw the request."""
        if stop:
            self._store.write(_STOP, b"")
        else:
            self._store.remove(_STOP)

    def stop_requested(self) -> bool:
        """Whether runs should end."""
        return self._store.has(_STOP)


@dataclass(frozen=True)
class Record:
    """The record of one job.

    Attributes:
        status: "cut" if its worker died, "stopped" if the user asked for it; both can be resumed.
        fingerprint: Of settings, data and version; empty if the settings were never valid.
        fault: What is wrong with its current settings, or None; the other fields then describe earlier settings.
        exit_code: The exit code of `sdlora train` for it; None while it is open.
        epoch: The epoch that was kept; None unless it is done.
        seconds: Time spent on it in all attempts together.
        peak_memory_bytes: Peak memory of its worker; None if unknown.
    """

    status: Status = "waiting"
    fingerprint: str = ""
    error: str | None = None
    fault: str | None = None
    exit_code: int | None = None
    epoch: int | None = None
    seconds: float = 0.0
    peak_memory_bytes: int | None = None

    @property
    def outcome(self) -> tuple[Status, str | None]:
        """The status to report, and the error that belongs to it."""
        return ("failed", self.fault) if self.fault else (self.status, self.error)


@dataclass
class Ledger:
    """The records of a batch by job name, in `batch.json`, so that the same command resumes it.

    The file is replaced atomically after every change, by the one process that holds the lock.
    """

    folder: Path
    records: dict[str, Record] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> Ledger:
        """The ledger of an earlier call, or an empty one.

        Raises:
            OutputError: The file was not written by sdlora.
        """
        file = folder / LEDGER
        if not file.exists():
            return cls(folder)
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            return cls(folder, {name: Record(**record) for name, record in content["jobs"].items()})
        except (ValueError, TypeError, KeyError) as error:
            raise OutputError(
                f"{file} is not the record of a batch ({error}). Move it away, or choose another --output."
            ) from error

    def put(self, name: str, record: Record) -> None:
        """Save the record of a job."""
        self.records[name] = record
        write_json(self.folder / LEDGER, {"jobs": {key: asdict(value) for key, value in self.records.items()}})


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock the folder of a batch within the block.

    Raises:
        OutputError: Another process works in it, or the folder cannot be created.
    """
    with ExitStack() as held:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            held.enter_context(hold(folder / "batch.lock", "sdlora batch"))
        except BusyError as error:
            raise OutputError(
                f"Another process works on the batch in {folder}. Wait until it ends, or choose another --output."
            ) from error
        except OSError as error:
            raise OutputError(f"{folder} cannot be written: {error.strerror}. Choose another --output.") from error
        yield
