"""One job in a worker, on any machine: the run's events as messages, and how it ended.

Called by the workers of both engines.
"""

from __future__ import annotations

import contextlib
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from sdlora.batch.engine import Message, Task
from sdlora.common.files import remove_partial
from sdlora.common.remote import open_run
from sdlora.config.schema import RunConfig
from sdlora.errors import SdloraError, StoreError
from sdlora.events import Exported
from sdlora.run.run import Stopped, start
from sdlora.run.setup import BaseSource, forget_accelerator

_PROC = Path("/proc/self")


def run_task(task: Task, bases: BaseSource, should_stop: Callable[[], bool]) -> Iterator[Message]:
    """Run a job, or resume it; `should_stop` is polled between steps. Failures are reported, not raised.

    Yields:
        The run's events, and finally "ended" with status, error, exit_code, epoch, seconds and peak_memory_bytes.
    """
    begin, peak = time.monotonic(), PeakMemory()
    ending: Message = {"status": "done", "error": None, "exit_code": 0, "epoch": None}
    try:
        forget_accelerator()
        folder, mirrored = open_run(task.folder, resume=None)
        resume = (folder / "config.toml").is_file()
        if not resume and folder.is_dir():
            remove_partial(folder)  # it was killed before its first file was complete
        config = RunConfig.model_validate(task.config)
        for event in mirrored(start(config, folder, resume=resume, should_stop=should_stop, bases=bases)):
            if isinstance(event, Exported):
                ending["epoch"] = event.epoch
            yield {"job": task.job, **event.to_json()}
    except Stopped:
        ending |= {"status": "stopped", "exit_code": None}
    except StoreError as error:
        # Nothing is wrong with the job: the same command resumes it.
        ending |= {"status": "cut", "error": str(error), "exit_code": error.exit_code}
    except SdloraError as error:
        ending |= {"status": "failed", "error": str(error), "exit_code": error.exit_code}
    except Exception as error:
        # A worker is a boundary like the command line: the traceback goes to its log, and the next job runs.
        traceback.print_exc(file=sys.stderr)
        ending |= {"status": "failed", "error": f"{type(error).__name__}: {error}", "exit_code": 1}
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    seconds = time.monotonic() - begin
    yield {"job": task.job, "event": "ended", **ending, "seconds": seconds, "peak_memory_bytes": peak.num_bytes()}


class PeakMemory:
    """Peak memory from its creation on, of the GPU if there is one, else of this process; another one restarts it."""

    def __init__(self) -> None:
        self._resets = False
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            return
        with contextlib.suppress(OSError):
            (_PROC / "clear_refs").write_text("5")  # Linux: resets the high-water mark to what is resident now
            self._resets = True

    def num_bytes(self) -> int | None:
        """The peak so far; None where the system knows only the peak of the process's whole life."""
        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated()
        if not self._resets:
            return None
        found = re.search(r"VmHWM:\s+(\d+) kB", (_PROC / "status").read_text(encoding="utf-8"))
        return int(found.group(1)) * 1024 if found else None
