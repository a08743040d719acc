"""A working directory with a few images for all tests of importers."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.imports import workplace


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    workplace(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path
