"""The command line starts quickly: nothing heavy is imported before it is needed."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "diffusers", "transformers", "accelerate", "peft", "numpy", "scipy", "gradio", "matplotlib")
ASK = """
import sys
from sdlora.cli.main import app
try:
    app({arguments!r})
except SystemExit as done:
    assert not done.code, done.code
print("loaded:", *[name for name in {heavy!r} if name in sys.modules])
"""


@pytest.mark.parametrize(
    "arguments", [["--help"], ["train", "--help"], ["plan", "--help"], ["--version"], ["config", "show", "quickstart"]]
)
def test_help_and_version_import_no_heavy_library(arguments: list[str]) -> None:
    code = ASK.format(arguments=arguments, heavy=HEAVY)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1].strip() == "loaded:"


def test_ctrl_c_while_importing_ends_in_words() -> None:
    code = """
import sys
class Interrupted:
    def find_spec(self, name, *_):
        if name == "typer":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupted())
from sdlora.__main__ import main
main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "Interrupted.\n")
