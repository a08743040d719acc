"""Files of a version, kept so that later versions are held to reading them.

    python tests/helpers/fixtures.py

writes those of the version that is installed. They are never made anew once that version is released.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from helpers.commandline import CommandLine
from helpers.scene import make_scene

from sdlora import __version__

FIXTURES = Path(__file__).parents[1] / "reliability" / "released"


def make(target: Path) -> None:
    """The last checkpoint and the LoRA of a small run."""
    with tempfile.TemporaryDirectory() as folder:
        scene = make_scene(Path(folder), CommandLine(Path(folder)))
        run = scene.root / "run"
        outcome = scene.train(run)
        assert outcome.code == 0, outcome.err
        target.mkdir(parents=True)
        shutil.copy(run / "hero.safetensors", target)
        shutil.copytree(max((run / "checkpoints").iterdir()), target / "checkpoint")


if __name__ == "__main__":
    make(FIXTURES / __version__)
