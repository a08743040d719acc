"""Worker process: runs tasks one after the other and keeps the base model loaded between them.

Reads tasks as JSON lines from stdin and writes messages as JSON lines to stdout. The end of stdin asks it to stop, so
that a worker whose parent has died saves its job and ends.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading

from sdlora.common.process import quiet_libraries


def main() -> None:
    """Run the tasks that stdin names, until it ends."""
    # Ctrl-C reaches every process of a terminal; the parent decides what to do about it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # What libraries print must not mix with the messages.
    messages = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    quiet_libraries()
    from sdlora.batch.engine import Task
    from sdlora.batch.task import run_task
    from sdlora.run.setup import BasePool

    tasks: queue.Queue[Task | None] = queue.Queue()
    stopping = threading.Event()

    def listen() -> None:
        for line in sys.stdin:
            tasks.put(Task(**json.loads(line)))
        stopping.set()
        tasks.put(None)

    threading.Thread(target=listen, daemon=True).start()
    bases = BasePool()
    for task in iter(tasks.get, None):
        for message in run_task(task, bases, stopping.is_set):
            try:
                print(json.dumps(message, ensure_ascii=False), file=messages, flush=True)
            except BrokenPipeError:
                stopping.set()  # the parent is gone; save the job all the same
                messages = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115


if __name__ == "__main__":
    main()
