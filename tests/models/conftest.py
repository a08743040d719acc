from __future__ import annotations

import pytest
from tiny import TINY

from sdlora.models.architectures import ARCHITECTURES


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the tiny shapes for the families' own, as a file in one holds no configuration."""
    for family, architecture in TINY.items():
        monkeypatch.setitem(ARCHITECTURES, family, architecture)
