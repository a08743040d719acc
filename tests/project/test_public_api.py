"""What `import sdlora` offers to programs: few names, none of them heavy before it is used."""

from __future__ import annotations

import subprocess
import sys

import pytest

import sdlora
from sdlora.common import bundled
from sdlora.lora_files import timestep_ranks


def test_public_names_are_these() -> None:
    assert sdlora.__all__ == ["__version__", "apply_timestep_rank", "pocket_folder"]
    assert sdlora.pocket_folder is bundled.pocket_folder
    assert sdlora.apply_timestep_rank is timestep_ranks.apply_timestep_rank


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = sdlora.no_such_name


def test_import_loads_no_heavy_library() -> None:
    code = "import sys; from sdlora import pocket_folder; print({'torch', 'diffusers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
