"""What the runs of a batch leave."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from helpers.checks import check

from sdlora.config.schema import RunConfig
from sdlora.config.toml import parse_config


def config(**lora: Any) -> RunConfig:
    return parse_config({"data": {"folder": "x"}, "lora": lora}, name="n")


def write_run(folder: Path, loss: float, *previews: Any, **signals: Any) -> None:
    """What a run leaves of its kept epoch 2."""
    epoch = folder / "epochs" / "2"
    epoch.mkdir(parents=True)
    check("clean", *previews, **signals).write(epoch)
    rows = [{"event": "epoch", "epoch": number, "heldout_loss": loss if number == 2 else 9.0} for number in (1, 2)]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


def runs_in(folder: Path) -> dict[str, Path]:
    """The run folders in a batch's, by the job's name."""
    return {run.name: run for run in folder.iterdir() if run.is_dir()}
