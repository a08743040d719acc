"""What the README shows is run as written."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from diffusers import StableDiffusionPipeline

from sdlora.common.bundled import pocket_folder
from sdlora.lora.inject import inject
from sdlora.lora.targets import find_targets
from sdlora.lora_files.write import LoraMetadata, save_lora

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def test_the_first_two_commands() -> None:
    commands = re.findall(r"```bash\n(.*?)\n```", README, flags=re.DOTALL)
    assert commands[0] == "pip install . && sdlora train quickstart"
    assert commands[1] == 'pip install -e ".[dev]" && pytest'


def test_the_five_lines_that_load_a_lora(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)\n```", README, flags=re.DOTALL)
    assert len(code.splitlines()) == 5
    base = StableDiffusionPipeline.from_pretrained(pocket_folder())
    adapter = inject(base.unet, find_targets(base.unet, ["cross_attention"]), 8, 8.0, 0)
    metadata = LoraMetadata("quickstart", "pocket", "stable-diffusion-v1", 64, "zumi", 4, 1, 1.7e9, {})
    save_lora(tmp_path / "runs/quickstart/quickstart.safetensors", adapter.state(), metadata=metadata)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code, names)  # the README's own five lines
    assert (tmp_path / "zumi.png").stat().st_size > 0
