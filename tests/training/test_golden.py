"""Golden losses: 20 steps on a tiny random base give the numbers they gave before, to the last bit.

A refactor must reproduce them. A change of the mathematics writes them anew, and says why:
    SDLORA_WRITE_GOLDEN=1 pytest tests/training/test_golden.py
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from sdlora.configfile import load_config
from sdlora.events import StepDone
from sdlora.run import start

GOLDEN = Path(__file__).with_name("golden_losses.json")


def losses(folder: Path, overrides: list[str]) -> list[float]:
    source = folder / "golden.toml"
    source.write_text("[data]\ntrigger = 'zumi'\nrepeats = 4\n[train]\nlearning_rate = 1e-3\n")
    config = load_config(str(source), [*overrides, "preview.enabled=false"])
    return [event.loss for event in start(config, folder / "run") if isinstance(event, StepDone)]


def test_twenty_steps_give_the_same_losses(tmp_path: Path, overrides: list[str]) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = losses(tmp_path, overrides)
    finally:
        torch.set_num_threads(before)
    assert len(found) == 20
    if os.environ.get("SDLORA_WRITE_GOLDEN"):
        GOLDEN.write_text(json.dumps({"torch": torch.__version__, "losses": found}, indent=2) + "\n")
    golden = json.loads(GOLDEN.read_text())
    if golden["torch"] != torch.__version__:
        # Another build of torch rounds differently; there the curve is still the same.
        assert found == pytest.approx(golden["losses"], rel=1e-4)
    else:
        assert found == golden["losses"]
