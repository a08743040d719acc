"""One job in a worker, on any machine: the run's events as messages, and how it ended.

Called by the workers of both engines.
"""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch

from sdlora.batch.engine import Message, Task
from sdlora.common.files import remove_partial
from sdlora.common.peak_memory import PeakMemory
from sdlora.common.remote import open_run
from sdlora.config.schema import RunConfig
from sdlora.errors import SdloraError, StoreError
from sdlora.events import Exported
from sdlora.run.run import Stopped, start
from sdlora.run.setup import BaseSource, forget_accelerator


def run_task(task: Task, bases: BaseSource, should_stop: Callable[[], bool]) -> Iterator[Message]:
    """Run a job, or resume it; `should_stop` is polled between steps. Failures are reported, not raised.

    Yields:
        The run's events, and finally "ended" with status, error, exit_code, epoch, seconds and peak_memory_bytes.
    """
    begin, peak = time.monotonic(), PeakMemory()
    ending: Message = {"status": "done", "error": None, "exit_code": 0, "epoch": None}
    try:
        for event in _events(task, bases, should_stop):
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


def _events(task: Task, bases: BaseSource, should_stop: Callable[[], bool]) -> Iterator[Any]:
    forget_accelerator()
    folder, mirrored = open_run(task.folder, resume=None)
    resume = (folder / "config.toml").is_file()
    if not resume and folder.is_dir():
        remove_partial(folder)  # it was killed before its first file was complete
    config = RunConfig.model_validate(task.config)
    yield from mirrored(start(config, folder, resume=resume, should_stop=should_stop, bases=bases))
