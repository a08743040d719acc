"""Where a batch and the runs of its jobs lie: in a folder, or at a URL with a folder here to work in.

Runs go to a URL by themselves, from whatever machine carries them out (`sdlora.common.remote.open_run`); here
is what the batch itself keeps there and reads of them.
"""

from __future__ import annotations

import re
from pathlib import Path

from sdlora.common.remote import Store, download_set, is_url, work_folder

LEDGER = "batch.json"
_STOP = ".stop"  # no job can be named so


class Location:
    """Where a batch lies.

    Args:
        output: A folder or a URL.

    Attributes:
        output: As it was given.
        folder: What the batch itself writes is written here; that of a URL is this machine's alone.
        name: Of the folder or the URL's last part.

    Raises:
        ConfigError: The URL cannot be used.
        StoreError: There is no driver for it.
    """

    def __init__(self, output: str) -> None:
        self._is_far = is_url(output)
        self._store = Store(output if self._is_far else str(Path(output).absolute()))
        self.output = self._store.url if self._is_far else output
        self.folder = work_folder(self._store) if self._is_far else Path(output)
        self.name = Path(self._store.url).name

    def run(self, job: str) -> str:
        """The folder or URL of a job's run."""
        return f"{self.output}/{job}" if self._is_far else str(self.folder / job)

    def run_here(self, job: str, epoch: int) -> Path:
        """A finished run as a folder on this machine; from a URL it holds what the batch's report tells of an epoch."""
        if not self._is_far:
            return self.folder / job
        told = re.compile(rf"metrics\.jsonl|epochs/{epoch}/(copycheck\.json|previews/.*)")
        return download_set(self.run(job), told.fullmatch)

    def fetch(self) -> None:
        """Bring the batch's record here, where another machine may have written it."""
        if self._is_far:
            (self.folder / LEDGER).unlink(missing_ok=True)
            if self._store.has(LEDGER):
                self._store.download({LEDGER: self.folder / LEDGER})

    def keep(self, *names: str) -> None:
        """Put files of the batch itself to its URL.

        Raises:
            StoreError: The store does not answer.
        """
        for name in names if self._is_far else ():
            self._store.upload(self.folder / name, name)

    def move_aside(self, job: str) -> str | None:
        """Keep a run that was made from other settings or images: nothing that a person waited for is deleted.

        Returns:
            Where it is now; None if there was none.
        """
        if not self._store.has(job):
            return None
        number = 1
        while self._store.has(f"{job}.{number}"):
            number += 1
        self._store.move(job, f"{job}.{number}")
        return self.run(f"{job}.{number}")

    def ask_to_stop(self, wish: bool) -> None:
        """Tell runs on all machines to save themselves and end, or take that back."""
        if wish:
            self._store.write(_STOP, b"")
        else:
            self._store.remove(_STOP)

    def asked_to_stop(self) -> bool:
        """Whether runs are to end."""
        return self._store.has(_STOP)
