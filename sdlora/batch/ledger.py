"""What became of every job of a batch, kept so that the same command goes on where it was.

`batch.json` is replaced atomically after every change, by the one process that holds the lock.
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
    """What is known of one job.

    Attributes:
        status: "cut" if its worker ended without a word, "stopped" if the user asked; both can be resumed.
        fingerprint: Of settings, data and version; empty where the settings were never right.
        error: What went wrong, or None.
        fault: What is wrong with its settings as they now are, or None; what is known from before stays beside it.
        exit_code: What `sdlora train` would have ended in; None while it is open.
        epoch: The epoch that was kept; None unless it is done.
        seconds: Spent on it, all attempts together.
        peak_memory_bytes: The most that its worker held meanwhile; None where it cannot be told.
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
        """How the job stands, and what is wrong."""
        return ("failed", self.fault) if self.fault else (self.status, self.error)


@dataclass
class Ledger:
    """The records of a batch by job, in `batch.json`.

    Attributes:
        folder: The batch's.
        records: By the job's name.
    """

    folder: Path
    records: dict[str, Record] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> Ledger:
        """What an earlier call left, or nothing.

        Raises:
            OutputError: The file is not one of sdlora's.
        """
        file = folder / "batch.json"
        if not file.exists():
            return cls(folder)
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            return cls(folder, {name: Record(**record) for name, record in content["jobs"].items()})
        except (ValueError, TypeError, KeyError) as error:
            raise OutputError(f"{file} is no record of a batch ({error}). Move it away, or choose --output.") from error

    def put(self, name: str, record: Record) -> None:
        """Keep a job's record."""
        self.records[name] = record
        write_json(self.folder / "batch.json", {"jobs": {key: asdict(value) for key, value in self.records.items()}})


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a batch's folder for the length of the block.

    Raises:
        OutputError: Another process works on it, or the folder cannot be made.
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
