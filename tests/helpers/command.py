"""The command line, called in this process."""

from __future__ import annotations

import sys

import pytest

from sdlora.cli import main


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """The exit code, stdout and stderr of `sdlora ARGUMENTS`."""
    before = sys.argv
    sys.argv = ["sdlora", *arguments]
    try:
        with pytest.raises(SystemExit) as caught:
            main.main()
    finally:
        sys.argv = before
    code = caught.value.code
    return (code if isinstance(code, int) else 0, *capsys.readouterr())
