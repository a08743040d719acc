"""Location of a batch and of its runs: a folder, or a URL with a local working folder.

Runs upload themselves from the machine they run on (`sdlora.common.remote.open_run`); this module moves the batch's
own files, and what the report reads of the runs.
"""

from __future__ import annotations

import re
from pathlib import Path

from sdlora.common.remote import Store, download_set, is_url, work_folder

LEDGER = "batch.json"
_STOP = ".stop"  # not a valid job name


class Location:
    """The folder or URL of a batch.

    Args:
        output: A folder or a URL.

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
        """Rename a run of other settings or images instead of deleting it.

        Returns:
            Its new location; None if there was no such run.
        """
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
