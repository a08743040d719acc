"""Ctrl-C and SIGTERM as a wish to stop, so that what runs can save itself first."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

EXIT_INTERRUPTED, EXIT_TERMINATED = 130, 143


@contextmanager
def stop_signals(say: Callable[[str], None]) -> Iterator[Callable[[], int | None]]:
    """Turn the first Ctrl-C or SIGTERM into a wish to stop; the second one interrupts at once.

    Args:
        say: Tells the user what happens next.

    Yields:
        A function that gives the signal received so far, or None.
    """
    received: list[int] = []

    def handle(number: int, _: FrameType | None) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)
        say("Stopping after this step; the checkpoint is saved. Once more stops at once.")

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: received[0] if received else None
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def exit_code_of(received: int | None) -> int:
    """The exit code of a run that a signal stopped."""
    return EXIT_TERMINATED if received == signal.SIGTERM else EXIT_INTERRUPTED
