"""The status of every job of a batch in `batch.json`, so that the same command resumes it.

The file is replaced atomically after every change, by the one process that holds the lock.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from sdlora.common.files import write_json
from sdlora.common.locks import hold
from sdlora.errors import BusyError, OutputError

Status = Literal["waiting", "running", "done", "failed", "cut", "stopped"]


@dataclass(frozen=True)
class Record:
    """The record of one job.

    Attributes:
        status: "cut" if its worker died, "stopped" if the user asked for it; both can be resumed.
        fingerprint: Of settings, data and version; empty if the settings were never valid.
        error: Why it failed, or None.
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
    """The records of a batch by job, in `batch.json`.

    Attributes:
        folder: Of the batch.
        records: By job name.
    """

    folder: Path
    records: dict[str, Record] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> Ledger:
        """The ledger of an earlier call, or an empty one.

        Raises:
            OutputError: The file was not written by sdlora.
        """
        file = folder / "batch.json"
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
        write_json(self.folder / "batch.json", {"jobs": {key: asdict(value) for key, value in self.records.items()}})


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
