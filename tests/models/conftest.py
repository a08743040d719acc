"""Tiny bases of every family, in folders and in their authors' layout."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.bases import FAMILIES, Layouts
from helpers.ldm import authors_layout
from helpers.tiny import make_tiny, tiny_networks

from sdlora.common.families import Family
from sdlora.models.architectures import ARCHITECTURES


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[Family, Path]:
    root = tmp_path_factory.mktemp("families")
    for family in FAMILIES:
        make_tiny(family, root / family)
    return {family: root / family for family in FAMILIES}


@pytest.fixture(scope="session")
def layouts() -> Layouts:
    return {family: authors_layout(family, tiny_networks(family)) for family in ARCHITECTURES}
