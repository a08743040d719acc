"""What passes between a batch and its workers: a task in, messages out, all of them plain JSON values.

Needs neither torch nor diffusers, so that a batch with nothing left to do says so at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]
"""{"job": its name, "event": ...} and the event's own keys; "ended" is the last one of a job."""


@dataclass(frozen=True)
class Task:
    """What a worker is told.

    Attributes:
        job: The job's name.
        config: The run's configuration, as `RunConfig.model_dump` gives it.
        folder: The run's folder, or its URL.
    """

    job: str
    config: dict[str, Any]
    folder: str
