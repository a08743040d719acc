"""What the tests of promises share."""

from __future__ import annotations

import pytest
from helpers.commandline import CommandLine
from helpers.scene import Scene, make_scene


@pytest.fixture(scope="session")
def scene(tmp_path_factory: pytest.TempPathFactory, command: CommandLine) -> Scene:
    return make_scene(tmp_path_factory.mktemp("scene"), command)
