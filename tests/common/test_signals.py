"""The first signal is a wish, the second one an order, and afterwards everything is as before."""

from __future__ import annotations

import signal

import pytest

from sdlora.common.signals import exit_code_of, stop_signals


def test_first_signal_requests_a_stop_and_the_second_interrupts() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    said: list[str] = []
    with stop_signals(said.append) as received:
        assert received() is None
        signal.raise_signal(signal.SIGTERM)
        assert received() == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert received() == signal.SIGTERM
    assert len(said) == 1
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_exit_codes() -> None:
    assert exit_code_of(signal.SIGINT) == 130
    assert exit_code_of(signal.SIGTERM) == 143
