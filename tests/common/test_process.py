"""The first signal is a wish, the second one an order, and afterwards everything is as before."""

from __future__ import annotations

import logging
import signal

import pytest
from diffusers.utils import logging as diffusers_logging

from sdlora.common.process import exit_code_of, is_main_process, quiet_libraries, stop_signals


def test_warnings_are_silent_and_errors_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")
    before = logging.getLogger("accelerate").level
    try:
        with pytest.warns(UserWarning, match="kept") as caught:
            import warnings

            warnings.warn("kept", UserWarning, stacklevel=1)
            quiet_libraries()
            warnings.warn("silenced", UserWarning, stacklevel=1)
        assert [str(warning.message) for warning in caught] == ["kept"]
        assert logging.getLogger("accelerate").level == logging.ERROR
        assert not diffusers_logging.is_progress_bar_enabled()
    finally:
        logging.getLogger("accelerate").setLevel(before)
        diffusers_logging.enable_progress_bar()


def test_only_rank_zero_is_the_main_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert is_main_process()
    monkeypatch.setenv("RANK", "0")
    assert is_main_process()
    monkeypatch.setenv("RANK", "1")
    assert not is_main_process()


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


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no SIGHUP")
def test_a_closed_terminal_requests_a_stop_unless_it_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    def say(text: str) -> None:
        raise OSError(5, "Input/output error")

    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # it is ignored where the tests themselves run under nohup
    with stop_signals(say) as received:
        signal.raise_signal(signal.SIGHUP)
        assert received() == signal.SIGHUP
    assert exit_code_of(signal.SIGHUP) == 129 and signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_signals(say) as received:
            signal.raise_signal(signal.SIGHUP)
            assert received() is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_exit_codes() -> None:
    assert exit_code_of(signal.SIGINT) == 130
    assert exit_code_of(signal.SIGTERM) == 143
