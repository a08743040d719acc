"""Protocol between a batch and its workers: a task in, messages out, all of them plain JSON values.

Imports neither torch nor diffusers, so that a batch with nothing left to do ends at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]
"""{"job": name, "event": ...} and the keys of the event; "ended" is the last message of a job."""


@dataclass(frozen=True)
class Task:
    """One job for a worker.

    Attributes:
        job: Name of the job.
        config: Configuration of the run, from `RunConfig.model_dump`.
        folder: Folder or URL of the run.
    """

    job: str
    config: dict[str, Any]
    folder: str
