"""A worker: a process that carries out tasks one after the other and keeps their base loaded.

Tasks come as lines of JSON on stdin and messages go as lines of JSON to stdout. The end of stdin is the wish
to stop, so that a worker whose owner is gone saves its job and ends.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading

from sdlora.common.quiet import quiet_libraries


def main() -> None:
    """Carry out what stdin asks for until it ends."""
    # Ctrl-C reaches every process of a terminal; what is to be done about it, the owner says.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Whatever a library prints must not mix with the messages.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    quiet_libraries()
    from sdlora.batch.messages import Task
    from sdlora.batch.task import carry_out
    from sdlora.run.base_pool import BasePool

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
        for message in carry_out(task, bases, stopping.is_set):
            try:
                print(json.dumps(message, ensure_ascii=False), file=answers, flush=True)
            except BrokenPipeError:
                stopping.set()  # nobody listens any more; the job is saved all the same
                answers = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115


if __name__ == "__main__":
    main()
