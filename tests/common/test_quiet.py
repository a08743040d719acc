import logging

import pytest
from diffusers.utils import logging as diffusers_logging

from sdlora.common.quiet import is_main_process, quiet_libraries


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
