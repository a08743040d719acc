"""How a process of sdlora behaves: other libraries are quiet, and signals ask it to save its state and stop.

Used by the commands and by worker processes, before libraries are imported and around everything that takes long.
"""

from __future__ import annotations

import logging
import os
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from sdlora.errors import RenamedOptionWarning

EXIT_HUNG_UP, EXIT_INTERRUPTED, EXIT_TERMINATED = 129, 130, 143


def quiet_libraries() -> None:
    """Silence warnings and progress bars; errors still arrive as exceptions."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    warnings.simplefilter("ignore")
    warnings.simplefilter("always", RenamedOptionWarning)
    for name in ("accelerate", "torch", "huggingface_hub", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)
    import diffusers.utils.logging
    import transformers.utils.logging

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def is_main_process() -> bool:
    """Whether this process reports for its run: launchers of several processes set RANK."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def stop_signals(say: Callable[[str], None]) -> Iterator[Callable[[], int | None]]:
    """Turn the first Ctrl-C, SIGTERM or SIGHUP into a request to stop; the second one raises KeyboardInterrupt.

    SIGHUP comes when a terminal is closed; `nohup` and the like ignore it, and so does the process then.

    Yields:
        A function that returns the signal received so far, or None.
    """
    received: list[int] = []

    def handle(number: int, _: FrameType | None) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)
        with suppress(OSError):  # the terminal may be gone
            say("Stopping after this step and saving a checkpoint. Press Ctrl-C again to quit now.")

    asking = {signal.SIGINT, signal.SIGTERM}
    hang_up = getattr(signal, "SIGHUP", signal.SIGTERM)  # Windows has none
    if signal.getsignal(hang_up) != signal.SIG_IGN:
        asking.add(hang_up)
    previous = {number: signal.signal(number, handle) for number in asking}
    try:
        yield lambda: received[0] if received else None
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def exit_code_of(received: int | None) -> int:
    """The exit code of a run that a signal stopped."""
    if received == signal.SIGTERM:
        return EXIT_TERMINATED
    return EXIT_HUNG_UP if received == getattr(signal, "SIGHUP", 0) else EXIT_INTERRUPTED
