"""Ctrl-C and SIGTERM as a request to stop, so that a run can save its state first.

Used by the command line around everything that takes long.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

EXIT_INTERRUPTED, EXIT_TERMINATED = 130, 143


@contextmanager
def stop_signals(say: Callable[[str], None]) -> Iterator[Callable[[], int | None]]:
    """Turn the first Ctrl-C or SIGTERM into a request to stop; the second one raises KeyboardInterrupt.

    Yields:
        A function that returns the signal received so far, or None.
    """
    received: list[int] = []

    def handle(number: int, _: FrameType | None) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)
        say("Stopping after this step and saving a checkpoint. Press Ctrl-C again to quit now.")

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: received[0] if received else None
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def exit_code_of(received: int | None) -> int:
    """The exit code of a run that a signal stopped."""
    return EXIT_TERMINATED if received == signal.SIGTERM else EXIT_INTERRUPTED
