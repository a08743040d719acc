"""What the tests of promises share."""

from __future__ import annotations

import os

import pytest
from commandline import CommandLine
from promises import Figure, record
from scene import Scene, make_scene


@pytest.fixture(scope="session")
def command(tmp_path_factory: pytest.TempPathFactory) -> CommandLine:
    return CommandLine(tmp_path_factory.mktemp("commands"))


@pytest.fixture(scope="session")
def scene(tmp_path_factory: pytest.TempPathFactory, command: CommandLine) -> Scene:
    return make_scene(tmp_path_factory.mktemp("scene"), command)


@pytest.fixture
def figure() -> Figure:
    """Keeps what a test found for docs/reliability.md, if SDLORA_RECORD is set."""
    return record if os.environ.get("SDLORA_RECORD") else lambda *_: None
