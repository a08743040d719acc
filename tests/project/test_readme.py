"""What the README shows is true: its commands, its code, its badges and its table of memory."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from diffusers import StableDiffusionPipeline
from helpers.command import call

from sdlora import pocket_folder
from sdlora.lora.inject import find_targets, inject
from sdlora.lora_files.write import LoraMetadata, save_lora

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_first_two_commands_install_train_and_test() -> None:
    commands = re.findall(r"```bash\n(.*?)\n```", README, flags=re.DOTALL)
    assert commands[0] == "pip install . && sdlora train quickstart"
    assert commands[1] == 'pip install -e ".[dev]" && pytest'


def test_five_lines_of_diffusers_load_a_lora_and_draw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_badges_say_what_the_package_says() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["license"] == "Apache-2.0" and "Apache 2.0" in (ROOT / "docs/images/licence.svg").read_text()
    assert project["requires-python"] == ">=3.11" and "3.11+" in (ROOT / "docs/images/python.svg").read_text()


@pytest.mark.parametrize(
    ("row", "family", "setting"),
    [
        pytest.param("1.x", "sd1", "none", marks=pytest.mark.slow),
        pytest.param("2.x", "sd2", "none", marks=pytest.mark.slow),
        pytest.param("XL", "sdxl", "none", marks=pytest.mark.slow),
        pytest.param("int8", "sdxl", "int8", marks=pytest.mark.slow),
    ],
)
def test_table_of_memory_is_what_the_planner_says(
    row: str, family: str, setting: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (line,) = [
        line for line in README.splitlines() if line.startswith("|") and f"{row} |" in line.replace(" weights", "")
    ]
    peak, step, checkpointed = (float(number) for number in re.findall(r"([\d.]+)&nbsp;GiB", line))
    found = []
    for checkpointing in ("false", "true"):
        changes = [f"base.quantization={setting}", f"train.gradient_checkpointing={checkpointing}"]
        settings = [part for change in changes for part in ("--set", change)]
        code, out, err = call(capsys, "plan", "--family", family, *settings, "--json")
        assert code == 0, err
        found.append(json.loads(out))
    steps = [plan["peak_bytes"] - plan["parts"]["previews"] for plan in found]
    measured = [found[0]["peak_bytes"], *steps]
    assert [round(number / 2**30, 1) for number in measured] == [peak, step, checkpointed]
